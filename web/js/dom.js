/** Making elements, and putting them on nodes. */

/** A new element with a class name and what is in it: texts and elements. */
export function element(name, className = "", ...content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

/** A button with an icon. It does one thing at a time, and `onError` hears when that fails. */
export function actionButton(label, hint, icon, act, onError) {
  const sign = element("i", `pi ${icon}`);
  sign.setAttribute("aria-hidden", "true");
  const button = element("button", "", sign, ` ${label}`);
  button.type = "button";
  button.title = hint;
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      await act();
    } catch (error) {
      onError(error);
    } finally {
      button.disabled = false;
    }
  });
  return button;
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
  const widget = node.addDOMWidget(name, "custom_diffusion", frame, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => Math.min(Math.max(content.offsetHeight + AROUND, height), TALLEST),
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
