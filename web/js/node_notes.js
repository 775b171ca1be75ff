/** What a node tells of its last run, below its widgets: lines, warnings, a table. */

import { after, element, showOnNode } from "./dom.js";

const KEY = "custom_diffusion"; // nodes/types.py
const HEIGHT = 90;
const placed = new WeakMap();

/** To be called for every node of the pack. */
export function showNotes(node) {
  after(node, "onExecuted", (output) => {
    const [notes] = output?.[KEY] ?? [];
    if (!notes) return;
    const empty = !notes.lines.length && !notes.warnings.length && !notes.table.length;
    if (empty && !placed.has(node)) return; // no room for what is not said
    if (!placed.has(node)) {
      const place = element("div", "cd-notes");
      placed.set(node, place);
      showOnNode(node, "notes", place, HEIGHT);
    }
    placed.get(node).replaceChildren(...drawn(notes));
  });
}

function drawn({ lines, table, warnings }) {
  const parts = lines.map((line) => element("p", "", line));
  parts.push(...warnings.map((warning) => element("p", "cd-warning", warning)));
  if (table.length) {
    const [head, ...rows] = table;
    parts.push(element("table", "", tableRow("th", head), ...rows.map((row) => tableRow("td", row))));
  }
  return parts;
}

function tableRow(kind, texts) {
  return element("tr", "", ...texts.map((text) => element(kind, "", text)));
}
