/** Finding nodes in the graph that is open, its subgraphs included. */

import { app } from "../../../scripts/app.js";

const NO_ID = "00000000-0000-0000-0000-000000000000";

/** The id of the workflow that is open. One that was made of a prompt has none: it gets one. */
export function workflowId() {
  if (app.graph.id === NO_ID) app.graph.id = LiteGraph.uuidv4();
  return app.graph.id;
}

/** The node of an id as prompts have it: "3", or "12:3" for one in a subgraph. */
export function nodeOf(id) {
  let graph = app.graph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?._nodes.find((each) => String(each.id) === part);
    graph = node?.subgraph;
  }
  return node;
}

/** Of the open workflow, those of its subgraphs once each. */
export function allNodes() {
  return [app.graph, ...(app.graph.subgraphs?.values() ?? [])].flatMap((graph) => graph._nodes);
}

/** All ids that prompts have for a node: one for each place where its subgraph is used. */
export function promptIds(node) {
  if (!node.graph || node.graph === app.graph) return [String(node.id)];
  const places = allNodes().filter((each) => each.subgraph === node.graph);
  return places.flatMap(promptIds).map((place) => `${place}:${node.id}`);
}
