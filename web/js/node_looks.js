/** How the pack's nodes look: colours of their sockets, what is folded, and how wide they begin. */

import { app } from "../../../scripts/app.js";
import { t } from "./words.js";

/** As in the style sheet, where pages with nodes of HTML find them. */
const COLOURS = {
  CONCEPT: "#4db6ac",
  TRAINING_CONCEPT: "#c08b5c",
  REGULARIZATION_SET: "#90a4ae",
  CONCEPT_REGION: "#9575cd",
};
const UNFOLDED = "Comfy.Node.AlwaysShowAdvancedWidgets";
const LEAST_WIDTH = 260;
const BESIDE_TEXT = 90; // arrows, margins, and the gap between a label and its value
const SWITCH = 50; // around the two texts that nodes of HTML show beside each other
const LONGEST = 430; // what is wider still belongs into a wider text box
const LETTER = 7; // pixels of an average one

/** Sockets and links of the pack's types. To be called once. */
export function colourSockets() {
  for (const [type, colour] of Object.entries(COLOURS)) {
    for (const colours of [app.canvas.default_connection_color_byType, LGraphCanvas.link_type_colors]) {
      // Another palette sets all types that it does not know to nothing.
      Object.defineProperty(colours, type, { get: () => colour, set() {}, enumerable: true, configurable: true });
    }
  }
}

/**
 * Nodes on the canvas fold what is advanced, as those of HTML do: ComfyUI leaves it out there too, but
 * not the room that it takes. To be called for every node.
 */
export function foldAdvanced(node) {
  const advanced = node.widgets?.filter((widget) => widget.options?.advanced) ?? [];
  if (!advanced.length) return;
  const unfolded = () => node.showAdvanced || app.extensionManager.setting.get(UNFOLDED);
  for (const widget of advanced) {
    Object.defineProperty(widget, "hidden", { get: () => !unfolded(), set() {}, configurable: true });
  }
  const toggle = () => {
    node.showAdvanced = !node.showAdvanced;
    const [, height] = node.computeSize();
    node.setSize([node.size[0], height]);
    node.setDirtyCanvas(true, true);
  };
  const button = node.addWidget("button", "advanced", null, toggle, { canvasOnly: true, serialize: false });
  button.serialize = false;
  const label = () => t(node.showAdvanced ? "hideAdvanced" : "showAdvanced");
  Object.defineProperty(button, "label", { get: label, set() {}, configurable: true });
}

/** Wide enough for its labels beside their values, and as high as it has to be then. */
export function widen(node) {
  const texts = (node.widgets ?? []).filter((widget) => !widget.element && !widget.options?.multiline);
  const width = Math.min(Math.max(LEAST_WIDTH, ...texts.map(widthOf)), LONGEST);
  const [needed, height] = node.computeSize();
  node.setSize([Math.max(width, needed), height]);
}

const longest = (all) => Math.max(0, ...all.map((each) => String(each ?? "").length));

function widthOf({ label, name, value, options: { on, off, values } = {} }) {
  const shown = longest(Array.isArray(values) ? values : [value]);
  const letters = (label ?? name).length + (on ? 2 * longest([on, off]) : shown);
  return letters * LETTER + BESIDE_TEXT + (on ? SWITCH : 0);
}
