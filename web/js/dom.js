/** Making elements, and putting them on nodes. */

import { t } from "./words.js";

const COPIED_MS = 1500;

/** A new element with a class name and what is in it: texts and elements. */
export function element(name, className = "", ...content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

/**
 * A button with an icon. It does one thing at a time, and `onError` hears when that fails. It is
 * never `disabled`, which would take the keyboard's focus away: aria-disabled says it, and holds.
 */
export function actionButton(label, hint, icon, act, onError) {
  const sign = element("i", `pi ${icon}`);
  sign.setAttribute("aria-hidden", "true");
  const button = element("button", "", sign, ` ${label}`);
  button.type = "button";
  button.title = hint;
  let busy = false;
  button.addEventListener("click", async () => {
    if (busy || button.ariaDisabled === "true") return;
    busy = true;
    try {
      await act();
    } catch (error) {
      onError(error);
    } finally {
      busy = false;
    }
  });
  return button;
}

/** A bar that fills from left to right; `set` says how much is done, 0 to 1, and that in words. */
export class ProgressBar {
  constructor(label) {
    this.fill = element("div", "cd-fill");
    this.element = element("div", "cd-progress", this.fill);
    this.element.setAttribute("role", "progressbar");
    this.element.setAttribute("aria-label", label);
    this.element.setAttribute("aria-valuemin", 0);
    this.element.setAttribute("aria-valuemax", 100);
  }

  set(progress, words) {
    const percent = 100 * progress;
    this.element.setAttribute("aria-valuenow", percent.toFixed(1));
    this.element.setAttribute("aria-valuetext", words);
    this.fill.style.width = `${percent}%`;
  }
}

/** An error's sentence as text that can be marked, and a button that copies it. */
export function errorParts(error) {
  const said = element("p", "cd-trouble", error);
  said.setAttribute("role", "alert");
  return [said, copyButton(t("copyError"), t("copyErrorHint"), error)];
}

/** A button that copies a text, and says so. */
export function copyButton(label, hint, text) {
  const button = element("button", "cd-word", label);
  button.type = "button";
  button.title = hint;
  button.addEventListener("click", async () => {
    await copy(text);
    button.textContent = t("copied");
    setTimeout(() => (button.textContent = label), COPIED_MS);
  });
  return button;
}

/** Browsers offer `clipboard` only to pages of this machine, or of https. */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const box = element("textarea", "", text);
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
}

const TALLEST = 340; // as in the style sheet: what is longer scrolls
const AROUND = 30; // padding, and the margin that ComfyUI leaves

/**
 * Shows an element below a node's widgets, at least `height` pixels high. It is never saved with the
 * workflow, nor sent with the prompt. The node grows with what is in it.
 */
export function showOnNode(node, name, content, height) {
  const frame = element("div", "cd-node", content);
  frame.addEventListener("wheel", (event) => event.stopPropagation());
  // Else a page would move the node where its text is to be marked.
  frame.addEventListener("pointerdown", (event) => {
    if (event.target.closest(".cd-trouble")) event.stopPropagation();
  });
  const widget = node.addDOMWidget(name, "custom_diffusion", frame, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () =>
      content.childElementCount ? Math.min(Math.max(content.offsetHeight + AROUND, height), TALLEST) : 0,
  });
  widget.serialize = false;
  const grow = () => {
    const [width, needed] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], needed)]);
    node.setDirtyCanvas(true, true); // a canvas at rest would give the frame its new height later
  };
  grow();
  // Of the content, whose height does not follow from the node's: so this comes to an end.
  new ResizeObserver(grow).observe(content);
}

/** Calls `also` after a method of an object that may have none. */
export function after(object, method, also) {
  const own = object[method];
  object[method] = function (...given) {
    const result = own?.apply(this, given);
    also.apply(this, given);
    return result;
  };
}
