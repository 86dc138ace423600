// Shows what a running node has to say. ComfyUI itself only shows errors that end a run.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const SEVERITY = { info: "info", warning: "warn", error: "error" };
const LIFE_MS = { info: 10_000, warning: 30_000 }; // an error stays until it is closed

// An id such as "7:3" is of node 3 in the subgraph that is node 7.
function titleOf(nodeId) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const id of String(nodeId).split(":")) {
    node = graph?.getNodeById(Number(id));
    graph = node?.subgraph;
  }
  return node?.title ?? "LoRA Loom";
}

function show({ detail: message }) {
  app.extensionManager.toast.add({
    severity: SEVERITY[message.level],
    summary: `${titleOf(message.node_id)}: ${message.summary}`,
    detail: message.detail,
    life: LIFE_MS[message.level],
  });
}

app.registerExtension({
  name: "LoraLoom.Messages",
  setup() {
    api.addEventListener("lora_loom.message", show);
  },
});
