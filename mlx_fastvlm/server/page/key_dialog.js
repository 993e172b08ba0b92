/** Asks for the server's key. The key lives as long as the browser's tab, in api.js, and is written nowhere else. */

import { byId } from "./dom.js";

/**
 * Show the dialog until the user has decided.
 *
 * @param isWrong whether a key was given, and refused.
 * @returns the key, or null if the user gave none.
 */
export function askForKey(isWrong) {
  const [dialog, form, input] = ["key-dialog", "key-form", "key"].map(byId);
  byId("key-wrong").hidden = !isWrong;
  input.value = "";
  return new Promise((resolve) => {
    let key = null;
    form.onsubmit = (event) => {
      event.preventDefault();
      key = input.value.trim();
      dialog.close();
    };
    byId("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => resolve(key);
    dialog.showModal();
  });
}
