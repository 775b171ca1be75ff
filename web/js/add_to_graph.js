/** Puts a saved concept to use in the graph that is on screen, which may be a subgraph. */

import { app } from "../../../scripts/app.js";
import { CHOICE, LOAD } from "./concept_card.js";
import { refreshChoices } from "./concepts.js";

const APPLY = "ApplyKVDelta";
const LEARNS = "CustomDiffusionTrain"; // a training goes on with the model as it is
const GAP = 40;
const CARD_HEIGHT = 120; // that the node grows by when it shows its concept
const RINGS = 40; // of places that are tried around the first

/**
 * A selected Load Concept gets the file. Else a new one does, with a new Apply Concept: between what
 * is selected that gives a MODEL or a CLIP and all that it feeds, or connected to nothing.
 */
export async function addToGraph(file) {
  await refreshChoices(); // so that the file is among the choices
  const selected = Object.values(app.canvas.selected_nodes);
  const loads = selected.filter((node) => node.comfyClass === LOAD);
  app.canvas.emitBeforeChange(); // one step to undo
  try {
    if (loads.length === 1) return choose(loads[0], file);
    insert(file, selected);
  } finally {
    app.canvas.emitAfterChange();
    app.canvas.setDirty(true, true);
  }
}

function choose(load, file) {
  const choice = load.widgets.find((widget) => widget.name === CHOICE);
  choice.value = file;
  choice.callback?.(file);
}

function insert(file, selected) {
  const { graph } = app.canvas;
  const load = LiteGraph.createNode(LOAD);
  const apply = LiteGraph.createNode(APPLY);
  const sources = ["MODEL", "CLIP"]
    .map((type) => ({ type, node: selected.find((node) => outputOf(node, type) >= 0) }))
    .filter(({ node }) => node);
  const width = load.size[0] + GAP + apply.size[0];
  const height = Math.max(load.size[1] + CARD_HEIGHT, apply.size[1]);
  const [left, top] = freePlace(graph, width, height, sources[0]?.node);
  load.pos = [left, top];
  apply.pos = [left + load.size[0] + GAP, top];
  graph.add(load);
  graph.add(apply);
  choose(load, file);
  load.connect(0, apply, apply.findInputSlot("concept"));
  for (const { type, node } of sources) wireThrough(graph, node, apply, type);
  app.canvas.selectItems([apply]); // what is added next goes between this one and what it feeds
  if (!seen(left, top, width, height)) app.canvas.centerOnNode(apply);
}

const outputOf = (node, type) => (node.outputs ?? []).findIndex((output) => output.type === type);

/** What an output feeds is fed by `apply` then, and `apply` by the output. */
function wireThrough(graph, source, apply, type) {
  const slot = outputOf(source, type);
  const out = outputOf(apply, type);
  const fed = (source.outputs[slot].links ?? []).map((id) => graph.getLink(id)).filter(Boolean);
  source.connect(slot, apply, apply.findInputSlot(type.toLowerCase()));
  for (const { target_id, target_slot } of fed) {
    const target = graph.getNodeById(target_id);
    if (target) {
      if (target.comfyClass !== LEARNS) apply.connect(out, target, target_slot);
    } else {
      graph.outputNode?.slots[target_slot]?.connect(apply.outputs[out], apply); // of a subgraph
    }
  }
}

/** Where a box of this size covers no node: right of `beside`, or in the middle, or near there. */
function freePlace(graph, width, height, beside) {
  const [seenLeft, seenTop, seenWidth, seenHeight] = app.canvas.ds.visible_area;
  const [x, y] = beside
    ? [beside.pos[0] + beside.size[0] + GAP, beside.pos[1]]
    : [seenLeft + (seenWidth - width) / 2, seenTop + (seenHeight - height) / 2];
  const free = ([left, top]) => graph._nodes.every((node) => apart(node, left, top, width, height));
  for (let ring = 0; ring <= RINGS; ring++) {
    const place = ringOf(ring).map(([i, j]) => [x + i * GAP * 2, y + j * GAP * 2]).find(free);
    if (place) return place;
  }
  return [x, Math.max(...graph._nodes.map((node) => node.pos[1] + node.size[1])) + 2 * GAP];
}

/** The places of a grid at this distance from its middle, those below first. */
function ringOf(ring) {
  const span = Array.from({ length: 2 * ring + 1 }, (_, index) => index - ring);
  const places = span.flatMap((i) => span.map((j) => [i, j]));
  const rim = places.filter((place) => Math.max(...place.map(Math.abs)) === ring);
  return rim.toSorted(([, a], [, b]) => b - a);
}

function apart(node, left, top, width, height) {
  const title = LiteGraph.NODE_TITLE_HEIGHT;
  const tall = node.flags?.collapsed ? 0 : node.size[1];
  return (
    left + width + GAP / 2 < node.pos[0] ||
    node.pos[0] + node.size[0] + GAP / 2 < left ||
    top + height + title + GAP / 2 < node.pos[1] ||
    node.pos[1] + tall + title + GAP / 2 < top
  );
}

function seen(left, top, width, height) {
  const [seenLeft, seenTop, seenWidth, seenHeight] = app.canvas.ds.visible_area;
  return (
    left >= seenLeft && top >= seenTop &&
    left + width <= seenLeft + seenWidth && top + height <= seenTop + seenHeight
  );
}
