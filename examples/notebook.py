# A notebook as a script: the `# %%` lines separate cells in editors that know them.
# LLM works inside a notebook, where an event loop is running already.

# %%
from aserve import LLM, SamplingParams

llm = LLM("smollm2", max_model_len=2048)

# %% One prompt, the most likely answer
print(
    llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].text
)

# %% Three different answers to one prompt, repeatable by their seed
params = SamplingParams(n=3, temperature=1.2, seed=1, max_tokens=12)
for choice in llm.generate("My favourite animal is", params)[0].outputs:
    print(choice.index, repr(choice.text), choice.finish_reason)

# %% How likely was each token, and what else could it have been?
params = SamplingParams(temperature=0, max_tokens=4, logprobs=2)
for position in llm.generate("One, two, three,", params)[0].outputs[0].logprobs:
    print({entry.decoded_token: round(entry.logprob, 3) for entry in position.values()})

# %%
llm.close()
