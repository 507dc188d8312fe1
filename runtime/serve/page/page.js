// The page of owl2 serve. Every text is set as text, never as HTML.
const $ = (id) => document.getElementById(id);
const state = { id: null, messages: [], pending: [], running: null, turn: 0, adding: 0, tags: new Map(), copies: new Map(), fits: [], usualFit: "resize", saving: Promise.resolve(), deleted: new Set() };

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    const key = prompt("This server asks for its API key:");
    if (key) {
      document.cookie = `owl2_key=${encodeURIComponent(key)}; SameSite=Strict; path=/`;
      return call(path, options);
    }
  }
  let told = `The server answered with ${response.status}.`;
  try {
    told = (await response.json()).error.message;
  } catch { /* no JSON */ }
  throw Object.assign(new Error(told), { status: response.status });
}

function say(text, bad = false) {
  $("state").textContent = text;
  $("state").classList.toggle("bad", bad);
}

const pictureUrl = (picture) => `/owl2/pictures/${picture.id}`;
const seenUrl = (picture) => `${pictureUrl(picture)}?seen=${picture.fit ?? state.usualFit}`;
const FITS = { resize: "stretching", pad: "padding", crop: "cropping" };

function fitOptions(select, chosen) {
  select.replaceChildren(...state.fits.map((fit) => element("option", { value: fit, textContent: FITS[fit] ?? fit })));
  select.value = chosen;
  return select;
}

// Conversations

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");

async function showList() {
  const entries = await (await call("/owl2/conversations")).json();
  $("list").replaceChildren(...entries.map((entry) => {
    const open = element("button", { type: "button", className: "open", textContent: entry.title });
    open.setAttribute("aria-current", String(entry.id === state.id));
    open.onclick = () => openConversation(entry.id);
    const remove = element("button", { type: "button", textContent: "×", title: "Delete this conversation" });
    remove.setAttribute("aria-label", `Delete: ${entry.title}`);
    remove.onclick = async () => {
      if (!confirm(`Delete “${entry.title}”?`)) return;
      state.deleted.add(entry.id);
      if (entry.id === state.id) begin();
      await call(`/owl2/conversations/${entry.id}`, { method: "DELETE" });
      await showList();
    };
    return element("li", {}, open, remove);
  }));
}

async function openConversation(id) {
  stop();
  const turn = ++state.turn;
  try {
    await state.saving;
    const response = await call(`/owl2/conversations/${id}`);
    state.tags.set(id, response.headers.get("ETag"));
    const data = await response.json();
    if (turn !== state.turn) return; // something else was opened meanwhile
    stop();
    Object.assign(state, { id, messages: data.messages ?? [], pending: [] });
    location.hash = id;
    say("");
    $("note").textContent = "";
  } catch (error) {
    say(error.message, true);
  }
  closeMenu();
  show();
  await showList();
}

function begin() {
  stop();
  state.turn++;
  Object.assign(state, { id: null, messages: [], pending: [] });
  location.hash = "";
  say("");
  $("note").textContent = "";
  closeMenu();
  show();
  $("question").focus();
}

// One after the other, so that an older state never replaces a newer one.
function save(id, messages) {
  const body = JSON.stringify({ messages });
  state.saving = state.saving.catch(() => {}).then(async () => {
    if (state.deleted.has(id)) return;
    try {
      await write(state.copies.get(id) ?? id, body);
    } catch (error) {
      if (error.status !== 412) throw error;
      // Another tab was quicker: nothing of either is lost.
      const copied = newId();
      state.copies.set(id, copied);
      await write(copied, body);
      if (state.id === id) {
        state.id = copied;
        location.hash = copied;
      }
      if (state.messages === messages) $("note").textContent = "This conversation was changed or deleted elsewhere; it goes on here as a copy.";
    }
    await showList();
  });
  return state.saving.catch((error) => say(`The conversation could not be saved: ${error.message}`, true));
}

async function write(id, body) {
  const headers = { "Content-Type": "application/json", "If-Match": state.tags.get(id) ?? "new" };
  const response = await call(`/owl2/conversations/${id}`, { method: "PUT", headers, body });
  state.tags.set(id, response.headers.get("ETag"));
}

// Messages

function pictures(list) {
  return element("div", { className: "pictures" }, ...list.map((picture) => {
    const link = element("a", { href: pictureUrl(picture), target: "_blank", rel: "noopener" });
    link.append(element("img", { src: pictureUrl(picture), alt: picture.name || "image", loading: "lazy" }));
    return link;
  }));
}

function figures(message) {
  const t = message.timings;
  if (!t) return "";
  const reused = t.reused_tokens ? `, ${t.reused_tokens} tokens reused` : "";
  const speed = t.tokens_per_second ? `, ${t.tokens_per_second.toFixed(1)} tokens/s` : "";
  const first = t.time_to_first_token;
  return `first word after ${first < 1 ? `${Math.max(1, Math.round(1000 * first))} ms` : `${first.toFixed(1)} s`}${speed}${reused}`;
}

function tool(text, action) {
  const button = element("button", { type: "button", textContent: text });
  button.onclick = action;
  return button;
}

function messageItem(message, index) {
  const item = element("li", { className: message.role });
  item.setAttribute("aria-label", message.role === "user" ? "You" : "Answer");
  if (message.pictures?.length) item.append(pictures(message.pictures));
  item.append(element("div", { className: "text", textContent: message.text }));
  const tools = element("div", { className: "tools" });
  if (message.role === "user") {
    tools.append(tool("Edit", () => edit(index)));
    if (message.pictures?.length) {
      const seen = tool("As the model sees it", () => {
        const pressed = seen.getAttribute("aria-pressed") !== "true";
        seen.setAttribute("aria-pressed", String(pressed));
        const address = pressed ? seenUrl : pictureUrl;
        item.querySelectorAll(".pictures img").forEach((image, place) => { image.src = address(message.pictures[place]); });
      });
      seen.setAttribute("aria-pressed", "false");
      tools.append(seen);
    }
  } else {
    tools.append(
      tool("Copy", () => copy(message.text)),
      tool("Again", () => again(index)),
    );
    if (message.stopped && index === state.messages.length - 1) tools.append(tool("Continue", () => answer(true)));
    tools.append(element("span", { className: "figures", textContent: figures(message) }));
  }
  if (message.error) tools.append(element("span", { className: "bad", textContent: message.error }));
  item.append(tools);
  return item;
}

function show() {
  $("turns").replaceChildren(...state.messages.map(messageItem));
  $("turns").scrollTop = $("turns").scrollHeight;
  $("title").textContent = state.messages[0]?.text || (state.messages.length ? "(an image)" : "New conversation");
  $("pending").replaceChildren(...state.pending.map((picture, index) => {
    const remove = element("button", { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", `Remove ${picture.name}`);
    remove.onclick = () => { state.pending.splice(index, 1); show(); };
    const fit = fitOptions(element("select", { title: "How the picture is fitted to the model's square" }), picture.fit ?? state.usualFit);
    fit.setAttribute("aria-label", `How ${picture.name} is fitted`);
    const image = element("img", { src: seenUrl(picture), alt: picture.name });
    fit.onchange = () => { picture.fit = fit.value; image.src = seenUrl(picture); };
    return element("li", {}, image, fit, remove);
  }));
  const running = state.running !== null;
  $("stop").hidden = !running;
  $("send").disabled = running || state.adding > 0;
}

function edit(index) {
  stop();
  const message = state.messages[index];
  $("question").value = message.text;
  state.pending = [...(message.pictures ?? [])];
  state.messages.length = index;
  show();
  $("question").focus();
}

function again(index) {
  stop();
  state.messages.length = index;
  answer();
}

// Answers

function request(message) {
  const content = (message.pictures ?? []).map((picture) => ({
    type: "image_url", image_url: { url: `owl2-picture:${picture.id}`, preprocess: picture.fit },
  }));
  if (message.text) content.push({ type: "text", text: message.text });
  return { role: message.role, content: message.role === "user" ? content : message.text };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}

async function answer(goOn = false) {
  const messages = state.messages.map(request);
  const instructions = $("instructions").value.trim();
  if (instructions) messages.unshift({ role: "system", content: instructions });
  if (!goOn) state.messages.push({ role: "assistant", text: "" });
  const message = state.messages.at(-1);
  delete message.stopped;
  delete message.error;
  const controller = new AbortController();
  const seed = Math.floor(Math.random() * 2 ** 31);
  const [id, began] = [state.id ??= newId(), state.messages];
  location.hash = id;
  state.running = controller;
  show();
  save(id, began); // the question at least, whatever becomes of the answer
  say(await loaded() ? "Answering …" : "Loading the model …");
  if (controller.signal.aborted) return ended(id, began, message, controller);
  const body = JSON.stringify({
    messages, stream: true, stream_options: { include_usage: true }, seed,
    temperature: Number($("temperature").value), max_tokens: Number($("length").value),
  });
  let whole = false;
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body, signal: controller.signal };
    for await (const event of events(await call("/v1/chat/completions", options))) {
      if (event.error) throw new Error(event.error.message);
      if (event.timings) message.timings = event.timings;
      const text = event.choices?.[0]?.delta?.content ?? "";
      if (event.choices?.[0]?.finish_reason) {
        whole = true;
        message.stopped = event.choices[0].finish_reason === "length";
      }
      if (!text) continue;
      if (!message.text && state.messages === began) say("Answering …");
      message.text += text;
      if (state.messages !== began) continue;
      $("turns").lastElementChild.querySelector(".text").textContent = message.text;
      if ($("turns").scrollHeight - $("turns").scrollTop - $("turns").clientHeight < 120) $("turns").scrollTop = $("turns").scrollHeight;
    }
    if (!whole) throw new Error("The answer broke off: the connection to the server was lost.");
  } catch (error) {
    message.stopped = true;
    if (error.name !== "AbortError") message.error = error.message;
  }
  await ended(id, began, message, controller);
}

async function ended(id, began, message, controller) {
  const current = state.running === controller;
  if (current) state.running = null;
  if (began.at(-1) !== message) return; // it was taken back meanwhile
  message.stopped ||= controller.signal.aborted;
  if (state.messages === began) {
    show();
    say("");
    // For those who do not see it.
    $("told").textContent = message.error ? "The answer broke off." : message.stopped ? "The answer has stopped." : "The answer is complete.";
  }
  await save(id, began);
}

async function loaded() {
  try {
    return (await (await call("/health")).json()).loaded;
  } catch {
    return true; // the question itself will tell
  }
}

function stop() {
  state.running?.abort();
  state.running = null;
}

// Browsers give the clipboard only to pages of this machine and to those with TLS.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    say("The browser does not let this page use the clipboard; select the text and copy it.", true);
  }
}

// Images

async function add(files) {
  const target = state.messages;
  const refused = [];
  state.adding++;
  show();
  for (const file of files) {
    try {
      say(`Adding ${file.name || "image"} …`);
      const made = await (await call("/owl2/pictures", { method: "POST", body: file })).json();
      if (state.messages !== target) break; // another conversation is shown now
      state.pending.push({ id: made.id, name: file.name || "image", fit: $("fit").value });
    } catch (error) {
      refused.push(`${file.name || "The image"}: ${error.message}`);
    }
  }
  state.adding--;
  say(refused.join("\n"), refused.length > 0);
  show();
}

// Wiring

function closeMenu() {
  $("side").classList.remove("shown");
  $("menu").setAttribute("aria-expanded", "false");
}

function ask(event) {
  event.preventDefault();
  const text = $("question").value.trim();
  if (state.running || state.adding || (!text && !state.pending.length)) return;
  state.messages.push({ role: "user", text, pictures: state.pending });
  state.pending = [];
  $("question").value = "";
  answer();
}

$("ask").onsubmit = ask;
$("stop").onclick = stop;
$("new").onclick = begin;
$("menu").onclick = () => {
  const shown = $("side").classList.toggle("shown");
  $("menu").setAttribute("aria-expanded", String(shown));
};
// On a narrow screen the list covers the page: a touch beside it closes it.
document.querySelector("main").addEventListener("click", (event) => { if (event.target !== $("menu")) closeMenu(); });
$("files").onchange = () => { add([...$("files").files]); $("files").value = ""; };
$("copy").onclick = () => copy(state.messages.map((message) => {
  const shown = (message.pictures ?? []).map((picture) => `![${picture.name}](${picture.name})\n\n`).join("");
  return `**${message.role === "user" ? "You" : "Answer"}**\n\n${shown}${message.text}`;
}).join("\n\n"));
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { stop(); closeMenu(); }
});
document.querySelector("a.skip").onclick = (event) => { event.preventDefault(); $("question").focus(); };
window.addEventListener("hashchange", () => {
  const wanted = location.hash.slice(1);
  if (wanted === (state.id ?? "")) return;
  if (wanted) openConversation(wanted);
  else begin();
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  if (files.length) { event.preventDefault(); add(files); }
});
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  add([...event.dataTransfer.files]);
});
for (const name of ["temperature", "length", "instructions"]) {
  $(name).value = localStorage.getItem(name) ?? $(name).value;
  $(name).oninput = () => localStorage.setItem(name, $(name).value);
}

async function start() {
  try {
    const health = await (await call("/health")).json();
    const about = await (await call("/owl2/model")).json();
    Object.assign(state, { fits: about.preprocess.known, usualFit: about.preprocess.usual });
    const fit = localStorage.getItem("fit");
    fitOptions($("fit"), state.fits.includes(fit) ? fit : state.usualFit);
    $("fit").onchange = () => localStorage.setItem("fit", $("fit").value);
    $("facts").replaceChildren(...Object.entries({ Model: about.model, ...about.facts }).flatMap(([name, value]) => [
      element("dt", { textContent: name }), element("dd", { textContent: value }),
    ]));
    if (!health.loaded) say("The model is not in memory now; the first answer takes a little longer.");
    await showList();
    const wanted = location.hash.slice(1);
    if (wanted) await openConversation(wanted);
    else show();
  } catch (error) {
    say(error.message, true);
  }
}
start();
