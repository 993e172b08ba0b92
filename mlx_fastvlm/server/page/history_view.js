/** Shows the answers so far with their thumbnails, and lets them be copied, exported and cleared. */

import { byId, element, icon } from "./dom.js";
import { download, FORMATS, toMarkdown } from "./export.js";

/** Binds a `History` to its section of the page. */
export class HistoryView {
  #history;
  #notices;

  constructor(history, notices) {
    this.#history = history;
    this.#notices = notices;
    byId("copy-all").onclick = () => this.copy(toMarkdown(history.entries));
    byId("export").onclick = () => this.#export(FORMATS[byId("export-format").value]);
    byId("clear").onclick = () => this.#clear();
    history.addEventListener("change", () => this.#show());
    this.#show();
  }

  #show() {
    const { entries } = this.#history;
    byId("history-empty").hidden = entries.length > 0;
    byId("history-count").textContent = entries.length ? `${entries.length}` : "";
    for (const id of ["copy-all", "export", "clear"]) byId(id).disabled = entries.length === 0;
    const list = byId("history-list");
    const ids = new Set(entries.map(({ id }) => id));
    for (const item of [...list.children]) if (!ids.has(item.dataset.id)) item.remove();
    // What stays is not moved, as that would take the focus from it; it is in order already.
    for (const [index, entry] of entries.entries()) {
      const there = list.children[index] ?? null;
      if (there?.dataset.id !== entry.id) list.insertBefore(this.#item(entry), there);
    }
  }

  #item(entry) {
    const item = element("li", { className: "entry", data: { id: entry.id } }, thumbnail(entry));
    const words = element("div", { className: "entry-words" });
    words.append(element("p", { className: "entry-answer" }, entry.text || "(no words)"));
    const prompt = entry.isFollowUp ? `Then: ${entry.prompt}` : entry.prompt;
    words.append(element("p", { className: "entry-prompt" }, prompt));
    words.append(element("p", { className: "entry-facts" }, facts(entry)));
    const copy = this.#button("copy", "Copy", entry, () => this.copy(entry.text));
    const remove = this.#button("trash", "Remove", entry, () => this.#remove(item, entry));
    item.append(words, element("div", { className: "entry-tools" }, copy, remove));
    return item;
  }

  #button(iconName, title, entry, onclick) {
    const aria = { label: `${title} answer: ${entry.text.slice(0, 60)}` };
    return element("button", { type: "button", className: "bare", title, onclick, aria }, icon(iconName));
  }

  #remove(item, entry) {
    const next = item.nextElementSibling ?? item.previousElementSibling;
    this.#history.remove(entry.id);
    (next?.querySelector("button:last-of-type") ?? byId("history-title")).focus();
  }

  /** Put a text on the clipboard, and say so. */
  async copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      this.#notices.show("copy", "Copied.", { kind: "news", seconds: 2 });
    } catch {
      this.#notices.show("copy", "The browser does not let the page copy here. Select the text instead, or export it.");
    }
  }

  #export(format) {
    download(format.make(this.#history.entries), `fastvlm-answers.${format.extension}`, format.type);
  }

  #clear() {
    const undo = this.#history.clear();
    const action = { label: "Undo", run: undo };
    this.#notices.show("history", "The history is cleared.", { kind: "news", seconds: 10, action });
    byId("history-title").focus();
  }
}

function thumbnail({ thumbnail: source, source: name }) {
  return source
    ? element("img", { src: source, alt: name, className: "thumbnail", loading: "lazy" })
    : element("span", { className: "thumbnail" }, icon("picture"));
}

/** The figures of an answer in one line. */
function facts({ time, source, timings, finishReason }) {
  const parts = [new Date(time).toLocaleTimeString([], { timeStyle: "medium" }), source];
  if (timings) parts.push(`TTFT ${Math.round(1000 * timings.ttft)} ms`);
  if (finishReason === "stopped") parts.push("stopped");
  return parts.join(" · ");
}
