/** Keys that do what buttons do. Single keys can be turned off, and do nothing while text is typed. */

/** Whether a key that is pressed there belongs to the element: text is typed, or Space presses it. */
function isTaken(target, key) {
  const typed = target.closest("textarea, select, input:not([type=radio], [type=checkbox], [type=range])");
  return Boolean(typed) || (key === " " && Boolean(target.closest("button, a, summary, input")));
}

/**
 * Listen to the keyboard.
 *
 * @param keys by the key as the browser names it, in lower case: what to do.
 * @param isOn whether single keys are wanted just now; Escape works always.
 */
export function listen(keys, isOn) {
  document.addEventListener("keydown", (event) => {
    const { key, target, ctrlKey, metaKey, altKey, isComposing } = event;
    if (ctrlKey || metaKey || altKey || isComposing || event.repeat) return;
    if (document.querySelector("dialog[open]")) return; // it has its own
    const run = keys[key.toLowerCase()];
    if (!run || (key !== "Escape" && (!isOn() || isTaken(target, key)))) return;
    event.preventDefault();
    run();
  });
}
