"""Evaluating a bundle on the user's own data, and verifying that a device computes what it should.

Example::

    import owl2

    evaluation = owl2.evaluate("bundle/", "questions.jsonl", progress=print)
    print(evaluation.summary.to_json())
    assert owl2.verify("bundle/").passed
"""
