// Shows what a running node has to say. ComfyUI itself only shows errors that end a run.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { showNote } from "./graph.js";

app.registerExtension({
  name: "LoraLoom.Messages",
  setup() {
    api.addEventListener("lora_loom.message", ({ detail: message }) =>
      showNote(message.node_id, message.level, message.summary, message.detail),
    );
  },
});
