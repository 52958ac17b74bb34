// openai (Node): everything of the Images API that it has, against the server at argv[2].
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "unused", maxRetries: 0 });
const asked = { model: "scenes", prompt: "a red star", plan: "distilled", seed: 5 };

const whole = await client.images.generate({ ...asked, n: 2, size: "128x128", quality: "auto", style: null });
const events = [];
for await (const event of await client.images.generate({ ...asked, stream: true, partial_images: 2 })) {
  events.push(event);
}
const models = (await client.models.list()).data;
const model = await client.models.retrieve(models[0].id);
const refusals = [];
for (const body of [{ background: "transparent" }, { model: "dall-e-3" }]) {
  try {
    await client.images.generate({ ...asked, ...body });
  } catch (error) {
    refusals.push({ class: error.constructor.name, status: error.status, param: error.param, code: error.code });
  }
}
console.log(JSON.stringify({ whole, events, model, refusals }));
