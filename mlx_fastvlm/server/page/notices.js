/** What went wrong and what to do, and what can be undone: lines above the page, problems until they are dismissed. */

import { element, icon } from "./dom.js";

/** One line at most for each topic: the latest. */
export class Notices {
  #list;

  /** @param list the element that holds them. */
  constructor(list) {
    this.#list = list;
  }

  /**
   * Show a line.
   *
   * @param topic what it is about, for `dismiss`.
   * @param text what happened, and what the user can do.
   * @param kind "problem" or "news".
   * @param action `{label, run}` of a button beside the text.
   * @param seconds after which the line goes by itself, or null.
   */
  show(topic, text, { kind = "problem", action = null, seconds = null } = {}) {
    this.dismiss(topic);
    const line = element("div", { className: "notice", data: { kind, topic } });
    line.setAttribute("role", kind === "problem" ? "alert" : "status");
    line.append(icon(kind === "problem" ? "warning" : "info"));
    line.append(element("span", { className: "notice-text" }, text));
    if (action) {
      const run = () => {
        line.remove();
        action.run();
      };
      line.append(element("button", { type: "button", onclick: run }, action.label));
    }
    const close = element("button", { type: "button", className: "bare", aria: { label: "Dismiss" } }, icon("close"));
    close.onclick = () => line.remove();
    line.append(close);
    this.#list.append(line);
    if (seconds !== null) setTimeout(() => line.remove(), 1000 * seconds);
  }

  /** Take away what no longer holds of a topic. */
  dismiss(topic) {
    this.#list.querySelector(`[data-topic="${topic}"]`)?.remove();
  }
}
