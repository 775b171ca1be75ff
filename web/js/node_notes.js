/** What a node tells of its last run: lines, warnings, a table (nodes/types.py). */

import { element } from "./dom.js";

export function notesParts({ lines, table, warnings }) {
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
