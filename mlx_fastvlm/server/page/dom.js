/** Making and finding elements. Text always goes in as text, so nothing that a model says becomes markup. */

/** The element of this id; the page's markup promises that it is there. */
export function byId(id) {
  return document.getElementById(id);
}

/** A new element: properties are set as such, `data` and `aria` are attributes by their short names. */
export function element(tag, { data = {}, aria = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(data)) made.dataset[name] = value;
  for (const [name, value] of Object.entries(aria)) made.setAttribute(`aria-${name}`, value);
  made.append(...children);
  return made;
}

/** A drawing of icons.svg, for eyes only: what it stands beside, or a label, says it in words. */
export function icon(name) {
  const namespace = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(namespace, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(namespace, "use");
  use.setAttribute("href", `page/icons.svg#${name}`);
  svg.append(use);
  return svg;
}

/** Change what a button shows and says. */
export function relabel(button, iconName, text) {
  if (button.dataset.label === text) return;
  button.dataset.label = text;
  button.replaceChildren(icon(iconName), element("span", {}, text));
}

/** Resolve after so many milliseconds; reject with the signal's reason when it is aborted first. */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) {
      reject(signal.reason);
      return;
    }
    const onAbort = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", onAbort);
      resolve();
    }, milliseconds);
    signal?.addEventListener("abort", onAbort, { once: true });
  });
}
