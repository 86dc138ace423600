// Nodes of the open workflow, and notes in the corner of the window.
import { app } from "../../../scripts/app.js";

const SEVERITY = { info: "info", warning: "warn", error: "error" };
const LIFE_MS = { info: 10_000, warning: 30_000 }; // an error stays until it is closed

// An id such as "7:3" is of node 3 in the subgraph that is node 7.
export function findNode(nodeId) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const id of String(nodeId).split(":")) {
    node = graph?.getNodeById(Number(id));
    graph = node?.subgraph;
  }
  return node;
}

export function showNote(nodeId, level, summary, detail) {
  app.extensionManager.toast.add({
    severity: SEVERITY[level],
    summary: `${findNode(nodeId)?.title ?? "LoRA Loom"}: ${summary}`,
    detail,
    life: LIFE_MS[level],
  });
}
