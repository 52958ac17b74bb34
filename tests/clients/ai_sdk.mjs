// @ai-sdk/openai-compatible with the AI SDK's generateImage, against the server at argv[2].
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage } from "ai";

const provider = createOpenAICompatible({ name: "images", baseURL: `${process.argv[2]}/v1`, apiKey: "unused" });
const model = provider.imageModel("scenes");
const providerOptions = { images: { plan: "distilled", seed: 5, user: null } };
const asked = { model, prompt: "a red star", size: "128x128", maxRetries: 0, providerOptions };

const made = await generateImage({ ...asked, n: 2 });
let refusal;
try {
  await generateImage({ ...asked, size: "100x100" });
} catch (error) {
  refusal = { name: error.name, status: error.statusCode, message: error.message };
}
const images = made.images.map(({ base64, mediaType }) => ({ base64, mediaType }));
console.log(JSON.stringify({ images, warnings: made.warnings, refusal }));
