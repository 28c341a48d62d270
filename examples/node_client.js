// A gRPC client made from the .proto files alone: npm install @grpc/grpc-js @grpc/proto-loader, then
//   node examples/node_client.js 127.0.0.1:50051 "The capital of France is"
"use strict";

const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const folder = path.join(__dirname, "..", "serving", "proto");
const files = ["moejax/v1/inference.proto", "moejax/v1/resilience.proto"];
const definition = loader.loadSync(files, { includeDirs: [folder], enums: String, longs: String, defaults: true });
const { moejax } = grpc.loadPackageDefinition(definition);

const [address = "127.0.0.1:50051", text = "The capital of France is"] = process.argv.slice(2);
const credentials = grpc.credentials.createInsecure();
const inference = new moejax.v1.Inference(address, credentials);
const resilience = new moejax.v1.Resilience(address, credentials);
const metadata = new grpc.Metadata();
if (process.env.MOEJAX_API_KEY) metadata.set("authorization", `Bearer ${process.env.MOEJAX_API_KEY}`);

let complete = null;
const call = inference.Generate({ text, sampling: { temperature: 0, maxTokens: 32 } }, metadata);
call.on("data", (response) => {
  if (response.chunk) process.stdout.write(response.chunk.text);
  else complete = response.complete;
});
call.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
  inference.close();
  resilience.close();
});
call.on("end", () => {
  if (!complete) return;
  resilience.GetStatus({}, metadata, (error, status) => {
    if (error) throw error;
    const alive = status.ranks.filter((rank) => rank.state === "serving").length;
    const { finishReason: finish, usage, epochs } = complete;
    console.log(`\n${JSON.stringify({ finish, tokens: usage.completionTokens, epochs, alive })}`);
    inference.close();
    resilience.close();
  });
});
