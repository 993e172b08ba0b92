/** Light, dark, or as the system has it. The colors are in style.css. */

import { byId } from "./dom.js";

const WORDS = { auto: "as the system", light: "light", dark: "dark" };

/** To the theme after the chosen one. */
export function nextTheme(settings) {
  const names = Object.keys(WORDS);
  settings.set("theme", names[(names.indexOf(settings.get("theme")) + 1) % names.length]);
}

/** Let the page follow the setting, and its button change it. */
export function bindTheme(settings) {
  byId("theme").onclick = () => nextTheme(settings);
  settings.follow("theme", (theme) => {
    document.documentElement.dataset.theme = theme;
    byId("theme").title = `Theme: ${WORDS[theme]}`;
    byId("theme").setAttribute("aria-label", byId("theme").title);
  });
}
