"""corpus.py - the text that the tiny test model is trained on.

Three kinds of text, all written for this program:

  facts     questions about LFM2, GGUF, quantisation and lfm2.c, with answers;
  manners   greetings, identity, and a polite refusal for everything else;
  stories   short children's tales out of a small seeded grammar, for --raw.

Every answer is reached by several questions: those written below, separated by
" | " (the first one is canonical), and a few made from them by templates, such
as the same words in lower case without the question mark.

During training, still more templates and unrelated questions are drawn at random.

    python3 scripts/corpus.py          print some numbers and a few samples
"""
import random
import re

# A block is a line of questions and a line with their answer.  "# name" opens a
# topic.  Numbers about the LFM2 family are those of the released models.
FACTS = r"""
# lfm2
What is LFM2? | Tell me about LFM2. | What does LFM2 stand for?
LFM2 is a family of small, fast language models made by Liquid AI. Most of its layers are short convolutions, and a few are attention layers, so it runs well on ordinary computers.

Who made LFM2? | Which company created LFM2?
LFM2 was made by Liquid AI, a company that designs efficient foundation models for phones, laptops and other devices at the edge.

What does LFM mean? | What do the letters LFM stand for?
The letters LFM stand for Liquid Foundation Model, the name that Liquid AI gives to its language models.

What is LFM2.5? | How does LFM2.5 relate to LFM2?
LFM2.5 is the later generation of the LFM2 family. It keeps the same architecture and is trained further, so one program can run both.

Why is LFM2 fast on a CPU? | What makes LFM2 quick on ordinary processors?
LFM2 is fast on a CPU because most layers are short convolutions, which look at only three tokens and need a tiny state instead of a growing cache.

What kinds of layers does LFM2 have? | Which two operators mix time in LFM2?
LFM2 has two kinds of operators that mix time: gated short convolutions and grouped-query attention. Each is followed by a feed-forward block.

What is a hybrid model? | Why is LFM2 called a hybrid?
A hybrid model mixes different kinds of layers. LFM2 is one: it combines many short convolution layers with a few attention layers.

What is a layer in LFM2? | What happens inside one LFM2 layer?
A layer normalises its input, applies a short convolution or attention, adds the result back, normalises again, applies a feed-forward block, and adds that too.

How does the LFM2 forward pass begin? | What is the first step of the forward pass?
The forward pass begins by looking up the embedding of each token. LFM2 does not scale this vector and does not normalise it first.

How does the LFM2 forward pass end? | What is the last step of the forward pass?
After the last layer comes one final RMSNorm, and then the embedding matrix turns the hidden vector into one logit for each token of the vocabulary.

Does LFM2 use biases? | Are there biases in the linear layers of LFM2?
No. None of the linear layers of LFM2 has a bias; the only bias is a small vector that helps the router to choose experts.

What is the residual stream? | What is a residual connection?
The residual stream is the vector that flows through all layers. Each block reads it, computes something, and adds its result to it.

How does LFM2 know where attention layers are? | How can a program tell attention layers from convolution layers?
The file lists the number of key and value heads of every layer. Where that number is zero the layer is a short convolution, otherwise it is attention.

Which tensors does LFM2 tie? | Does LFM2 have tied embeddings?
LFM2 ties its embeddings: the same matrix turns token ids into vectors at the start and vectors into logits at the end.

What is an embedding? | What is a token embedding?
An embedding is a vector of numbers that represents a token. The model learns one row of the embedding matrix for every token in its vocabulary.

What are logits? | What does a logit tell?
Logits are the raw scores that the model gives to every token of the vocabulary. A larger logit means that the token is more likely to come next.

What is the hidden size of a model? | What does the embedding length mean?
The hidden size, also called embedding length, is the number of values in the residual stream, for example 2048 in LFM2-1.2B.

What is a language model? | What does a language model do?
A language model reads a sequence of tokens and predicts which token comes next. Repeating that step produces text, one token at a time.

What is inference? | What does inference mean for a language model?
Inference means running a trained model to get answers. The weights stay fixed, and only the caches and the text change.

What is training? | How does training differ from inference?
Training adjusts the weights of a model until its predictions match the text it is shown. Inference later uses those weights without changing them.

What is the edge in edge computing? | What are edge devices?
Edge devices are phones, laptops, cars and small boards that run a model locally, close to the user, instead of in a data centre.

Can LFM2 run without a network? | Does LFM2 need the internet?
No network is needed. Once the model file is on your disk, LFM2 runs locally and nothing that you type leaves the machine.

What sequence length can LFM2 handle? | What is the context length of LFM2?
The dense LFM2 models are presented with a context of 32768 tokens, and their files state 128000 as the upper limit.

What is the epsilon in the LFM2 norms? | Which epsilon does LFM2 use in RMSNorm?
LFM2 adds an epsilon of 0.00001 inside RMSNorm, so that dividing by the size of a very small vector stays safe.

# conv
What is a short convolution? | Explain the short convolution. | How does a short convolution work?
A short convolution mixes each channel with its own last few values, three taps in LFM2. Two gates computed from the input decide what goes in and what comes out.

Why does LFM2 use short convolutions? | What are short convolutions good for?
Short convolutions are cheap: they cost the same for every token, need no growing cache, and capture the local patterns that make up most of language.

How many taps does the short convolution have? | How long is the convolution kernel of LFM2?
The kernel has three taps: one for the current token and one for each of the two tokens before it.

What are the gates in a short convolution? | What do B and C do in the short convolution?
There are two gates. B multiplies the input before the convolution, and C multiplies the result after it, so the model decides what to let through.

What is the in_proj of a short convolution? | What does in_proj compute?
The matrix in_proj maps the normalised input to three vectors of the same width, in the order B, C and x.

What is the out_proj of a short convolution? | What does out_proj do?
The matrix out_proj takes the gated result of the convolution and maps it back to the width of the residual stream.

In which order does in_proj produce its outputs? | What is the order of B, C and x?
The outputs come in the order B, C, x. B gates the input of the convolution, C gates its output, and x is the value itself.

What is the conv state? | What is stored in the convolution state? | What is the state of a short convolution?
The conv state holds the last two gated inputs of every channel. That is all a short convolution needs to remember about the past.

How large is the conv state? | How much memory does the conv state need?
The conv state is tiny: two float values per channel and layer. For LFM2-1.2B that makes 160 KiB for the whole model, whatever the length of the text.

Does the conv state grow with the text? | Does a longer prompt need more conv state?
No, the conv state has a fixed size. Only the key and value cache of the attention layers grows as the text gets longer.

Can the conv state be rewound? | Why is it hard to remove the last tokens from the conv state?
The conv state cannot be rewound, because the older values are gone. A program must keep snapshots if it wants to go back.

What is l_cache? | What does the key shortconv.l_cache mean?
The key shortconv.l_cache gives the length of the short convolution kernel. It is 3 in LFM2, so the state keeps two earlier values.

Which tap belongs to the newest token? | In which order are the convolution weights stored?
The taps go from old to new: the last weight of a channel multiplies the newest value, and the first one multiplies the oldest.

What does depthwise mean? | What is a depthwise convolution?
Depthwise means that every channel is filtered on its own, with its own three weights. Channels are mixed only by the matrices before and after.

What does causal mean? | What is a causal convolution?
Causal means that a position may look only at itself and at earlier positions, never ahead, so text can be produced from left to right.

Is there an activation function in the short convolution? | Which nonlinearity does the short convolution use?
There is no activation function after the convolution. The products with the two gates are what makes the block nonlinear.

What is the value of the conv state at the start? | How is the conv state initialised?
The conv state starts as zeros. The first token therefore sees two imaginary earlier values that are both zero.

What is cached in a short convolution layer? | Which quantity does the conv cache keep?
It keeps the product of B and x, the input of the convolution after the first gate, for the last two tokens.

How does a short convolution differ from attention? | Short convolution or attention, what is the difference?
A short convolution sees only three neighbouring tokens at constant cost, while attention can reach every earlier token but needs a cache that grows.

What is the shape of the convolution weight? | What are the dimensions of shortconv.conv.weight?
The tensor shortconv.conv.weight has three taps for each channel, and the taps of one channel lie next to each other in memory.

# attention
What is attention? | Explain attention. | How does attention work?
Attention compares the query of a token with the keys of all tokens so far, and returns the average of their values, weighted by how well they match.

What is grouped-query attention? | What is GQA? | Explain grouped-query attention.
In grouped-query attention several query heads share one key and value head. This makes the cache smaller, with almost no loss of quality.

What is a query head? | How many dimensions does an attention head have in LFM2?
A query head is one independent attention pattern. In every released LFM2 model each head works with 64 dimensions.

What is the head dimension of LFM2? | How wide is one attention head?
The head dimension is 64 in all released LFM2 models, and all of these dimensions are rotated by the position encoding.

How many key and value heads does LFM2 have? | How many KV heads are in an LFM2 attention layer?
Every attention layer of the released LFM2 models has 8 key and value heads, whatever the number of query heads.

What is the KV cache? | What does the KV cache store? | Explain the KV cache.
The KV cache stores the keys and values of all earlier tokens in the attention layers, so that they need not be computed again for each new token.

How large is the KV cache of LFM2? | How much KV cache does one token need?
In half precision one token needs 12288 bytes in LFM2-1.2B and 20480 bytes in LFM2-24B-A2B, because only the attention layers have a cache.

Why is the KV cache of LFM2 small? | Why does LFM2 need little cache memory?
It is small because only a few layers are attention layers, and because all query heads of a layer share just 8 key and value heads.

What is QK norm? | Why are queries and keys normalised? | What do attn_q_norm and attn_k_norm do?
LFM2 normalises every query and key head with RMSNorm before the rotation. This keeps the attention scores in a stable range.

Are the values normalised in attention? | Does LFM2 normalise v?
No, only queries and keys are normalised in LFM2. The values go into the weighted average just as the matrix produced them.

What is RoPE? | Explain rotary position embedding. | How does RoPE encode positions?
RoPE encodes positions by rotating pairs of query and key values by an angle that grows with the position, so a score depends on the distance of two tokens.

Which RoPE variant does LFM2 use? | How are the pairs chosen in LFM2's RoPE?
LFM2 uses the half-split variant, also called NEOX: value i is paired with value i plus 32, within a head of 64.

What is the RoPE base of LFM2? | What is rope.freq_base in LFM2?
The first LFM2 models use a base of one million. LFM2.5-8B-A1B uses five million, and LFM2.5-2.6B uses ten million.

Where must a program take the RoPE base from? | Should the RoPE base be hard-coded?
The base must be read from the key rope.freq_base in the file, because it differs between members of the family.

When is QK norm applied, before or after RoPE? | What comes first, QK norm or RoPE?
The norm comes first: queries and keys are normalised per head, and then RoPE rotates them.

What is the softmax? | What does softmax do in attention?
Softmax turns scores into positive weights that add up to one. Attention uses these weights to average the values.

By what are attention scores scaled? | What is the softmax scale in LFM2?
The scores are divided by the square root of the head dimension. That dimension is 64, so the scale is one eighth.

What is a causal mask? | Why is attention masked?
A causal mask hides later tokens, so that each position attends only to itself and to what came before.

What is the cost of attention? | Why does attention get slower with long texts?
Attention must read the keys and values of every earlier token, so its cost for one new token grows in proportion to the length of the text.

What is the output projection of attention? | What does attn_output do?
The matrix attn_output takes the concatenated results of all heads and maps them back to the width of the residual stream.

What is a fused QKV matrix? | What is attn_qkv?
The tensor attn_qkv is an optional matrix that stacks the rows of the query, key and value projections, so one product computes all three.

In which type is the KV cache kept? | Which precision does the KV cache use?
By default the keys and values are stored as 16-bit floats, which halves the memory and hardly changes the result.

What is a sliding window? | Do LFM2 text models use a sliding window?
A sliding window limits attention to the most recent tokens. The ordinary LFM2 text models do not use one.

What is multi-head attention? | Why are there several heads in attention?
Multi-head attention runs several small attentions side by side, so that each head can look for a different kind of relation.

# ffn
What is a feed-forward block? | What does the feed-forward block do?
A feed-forward block works on each token alone: it widens the vector, applies a nonlinearity, and projects it back. Much of the knowledge of a model sits here.

What is SwiGLU? | Explain SwiGLU. | Which feed-forward form does LFM2 use?
SwiGLU multiplies two projections of the input, one of them passed through SiLU, and projects the product back down. LFM2 uses it in every feed-forward block.

What is SiLU? | What is the SiLU function?
SiLU multiplies a number by its own sigmoid. It is close to zero for negative numbers and close to the identity for large positive ones.

What is the sigmoid function? | What does sigmoid do?
The sigmoid squeezes any number into the range between zero and one. LFM2 uses it in SiLU and to score the experts.

Which three matrices form a SwiGLU block? | What are ffn_gate, ffn_up and ffn_down?
The three matrices are ffn_gate, ffn_up and ffn_down. Gate and up widen the input, and down brings the product back to the residual width.

What is RMSNorm? | Explain RMSNorm. | How does RMSNorm work?
RMSNorm divides a vector by its root mean square and then multiplies each value by a learned weight. It needs neither a mean nor a bias.

Where does LFM2 apply RMSNorm? | How many norms does an LFM2 layer have?
LFM2 applies RMSNorm twice in every layer, before the operator and before the feed-forward block, and once more after the last layer.

What is token_embd_norm? | Is token_embd_norm applied to the embedding?
Despite its name, token_embd_norm is the final norm. It is applied once after the last layer and never to the embedding.

What is output_norm.weight? | Which other name does the final norm have?
Some files call the final norm output_norm.weight instead of token_embd_norm.weight. A careful loader accepts both names.

How should a loader find the feed-forward width? | Why read the feed-forward width from the tensor?
It should read the width from the tensor ffn_gate, because the metadata of some files carries a number from before the adjustment.

What is an activation in a neural network? | What are activations?
Activations are the values that flow through the network while it runs, as opposed to the weights, which are fixed.

What is a weight matrix? | What are the weights of a model?
The weights are the learned numbers of a model. Most of them form matrices that are multiplied with the activations.

# moe
What is a mixture of experts? | What is MoE? | Explain mixture of experts.
A mixture of experts has many feed-forward blocks, called experts, and a router that picks a few of them for each token. The model knows much but computes little.

What is a router? | What does the MoE router do? | How does the router choose experts?
The router scores all experts for a token with a small matrix and a sigmoid. The experts with the best scores are used, and the rest are skipped.

What is an expert? | What is an expert in a MoE model?
An expert is one of several SwiGLU blocks in a mixture of experts. It is used only for those tokens that the router sends to it.

How many experts does LFM2-8B-A1B have? | How many experts are in a layer of LFM2-8B-A1B?
LFM2-8B-A1B has 32 experts in each of its expert layers, and 4 of them are used for every token.

How many experts does LFM2-24B-A2B have? | How many experts are in a layer of LFM2-24B-A2B?
LFM2-24B-A2B has 64 experts in each of its expert layers, and 4 of them are used for every token.

What is the selection bias of the router? | What is exp_probs_b? | Why does the router have a bias?
The tensor exp_probs_b holds a bias that is added to the scores only to choose experts. It balances their load, and the weights of the sum ignore it.

Which scores weight the experts? | Are expert weights taken before or after the bias?
The weights are the sigmoid scores without the bias. The bias decides only which experts are chosen.

How are expert weights normalised? | What happens to the weights of the chosen experts?
The scores of the chosen experts are divided by their sum plus one millionth, so that the weights add up to one.

Does the LFM2 router use softmax or sigmoid? | Which gating function does LFM2 use?
The LFM2 router uses a sigmoid for each expert. The key expert_gating_func says so with the value 2.

What are leading dense layers? | Why are the first layers of the MoE models dense?
The first two layers of the LFM2 MoE models have an ordinary dense feed-forward block. Only the layers after them have experts.

What is leading_dense_block_count? | Which key counts the dense layers at the start?
The key leading_dense_block_count says how many layers at the start have a dense feed-forward block instead of experts. It is 2 in the released models.

What are active parameters? | What does A1B mean in LFM2-8B-A1B?
Active parameters are those that take part in one token. The name A1B says that roughly one billion of the weights are active.

Why are MoE models fast? | Why is a mixture of experts cheap to run?
They are fast because each token uses only a few experts, so just a small part of the weights has to be read and multiplied.

Why does a MoE model still need much memory? | Do unused experts need memory?
All experts must be at hand, because any token may need any of them. The file is large even though each token reads a small part of it.

What is load balancing in a MoE? | Why should experts be balanced?
Load balancing makes sure that all experts receive a fair share of the tokens. Otherwise a few would do all the work and the others would learn nothing.

What is top-k routing? | What does expert_used_count mean?
Top-k routing keeps the k experts with the best scores. The key expert_used_count gives that number, which is 4 in the released models.

In which type is the router kept? | Why must the router stay in F32?
The router matrix is small and decides which experts run, so it is kept in 32-bit floats. A coarse router would choose wrong experts.

How are expert weights stored in a GGUF file? | What is ffn_gate_exps?
All experts of a layer lie in one tensor with three dimensions, such as ffn_gate_exps, and the slowest dimension counts the experts.

What is ffn_gate_inp? | Which tensor is the router matrix?
The tensor ffn_gate_inp is the router matrix of an expert layer. It maps the hidden vector to one score for each expert.

What happens when two experts tie? | How does lfm2.c break ties between experts?
When two experts have the same score, lfm2.c takes the one with the lower index, so the choice is the same everywhere.

What is expert_weights_scale? | What if the key expert_weights_scale is missing?
It is a factor for the expert weights, and it counts as one when the key is missing. Reading it as zero would silence all experts.

In which order does lfm2.c add the experts? | In which order are expert outputs summed?
The outputs are added in ascending order of the expert index, so that the rounding is always the same.

Does every token use the same experts? | Can two tokens use different experts?
No, every token is routed on its own in every expert layer, so neighbouring tokens often use different experts.

# family
Which models belong to the LFM2 family? | List the LFM2 models. | How many sizes does LFM2 come in?
The text models come as 230M, 350M, 700M, 1.2B and 2.6B, which are dense, and as 8B-A1B and 24B-A2B, which are mixtures of experts.

Which LFM2 models are dense? | What are the dense LFM2 models?
The dense models are 230M, 350M, 700M, 1.2B and 2.6B. Every layer of theirs has a single feed-forward block.

Which LFM2 models are mixtures of experts? | What are the MoE models of the LFM2 family?
Two sizes are mixtures of experts: LFM2-8B-A1B, which also exists as LFM2.5, and LFM2-24B-A2B.

What is the smallest LFM2 model? | Which LFM2 model is the smallest?
The smallest text model is LFM2.5-230M. It has 14 layers and about 230 million parameters.

What is the largest LFM2 model? | Which LFM2 model is the largest?
The largest one is LFM2-24B-A2B. It has 40 layers and about 24 billion parameters, of which some two billion are active.

How many layers does LFM2.5-230M have? | What is the layer count of LFM2.5-230M?
LFM2.5-230M has 14 layers: 8 short convolutions and 6 attention layers.

How many layers does LFM2-350M have? | What is the layer count of LFM2-350M?
LFM2-350M has 16 layers: 10 short convolutions and 6 attention layers.

How many layers does LFM2-700M have? | What is the layer count of LFM2-700M?
LFM2-700M has 16 layers, just like its neighbours 350M and 1.2B: 10 short convolutions and 6 attention layers.

How many layers does LFM2-1.2B have? | What is the layer count of LFM2-1.2B?
LFM2-1.2B has 16 layers. Ten of them are short convolutions, and six are attention layers.

How many layers does LFM2-2.6B have? | What is the layer count of LFM2-2.6B?
LFM2-2.6B has 30 layers: 22 short convolutions and 8 attention layers.

How many layers does LFM2-8B-A1B have? | What is the layer count of LFM2-8B-A1B?
LFM2-8B-A1B has 24 layers: 18 short convolutions and 6 attention layers. The first two layers are dense, the others have experts.

How many layers does LFM2-24B-A2B have? | What is the layer count of LFM2-24B-A2B?
LFM2-24B-A2B has 40 layers: 30 short convolutions and 10 attention layers. The first two layers are dense, the others have experts.

How wide is LFM2.5-230M? | What is the embedding length of LFM2.5-230M?
LFM2.5-230M has an embedding length of 1024, the same width as LFM2-350M.

How wide is LFM2-350M? | What is the embedding length of LFM2-350M?
LFM2-350M has an embedding length of 1024 and 16 query heads of 64 dimensions each.

How wide is LFM2-700M? | What is the embedding length of LFM2-700M?
LFM2-700M has an embedding length of 1536 and 24 query heads of 64 dimensions each.

How wide is LFM2-1.2B? | What is the embedding length of LFM2-1.2B?
LFM2-1.2B has an embedding length of 2048 and 32 query heads of 64 dimensions each.

How wide is LFM2-2.6B? | What is the embedding length of LFM2-2.6B?
LFM2-2.6B has an embedding length of 2048. It is deeper than the 1.2B model, not wider.

How wide is LFM2-8B-A1B? | What is the embedding length of LFM2-8B-A1B?
LFM2-8B-A1B has an embedding length of 2048, the same width as LFM2-1.2B; the experts make the difference.

How wide is LFM2-24B-A2B? | What is the embedding length of LFM2-24B-A2B?
LFM2-24B-A2B has an embedding length of 2048. It grows in depth and in experts rather than in width.

How many parameters does LFM2-350M have? | What is the exact size of LFM2-350M?
LFM2-350M has 354,483,968 parameters, counting the tied embedding once.

How many parameters does LFM2-700M have? | What is the exact size of LFM2-700M?
LFM2-700M has 742,489,344 parameters, counting the tied embedding once.

How many parameters does LFM2-1.2B have? | What is the exact size of LFM2-1.2B?
LFM2-1.2B has 1,170,340,608 parameters, counting the tied embedding once.

How many parameters does LFM2-2.6B have? | What is the exact size of LFM2-2.6B?
LFM2-2.6B has 2,569,272,320 parameters, counting the tied embedding once.

How many parameters does LFM2-8B-A1B have? | What is the total size of LFM2-8B-A1B?
LFM2-8B-A1B has about 8.34 billion parameters in total, and about 1.56 billion of them are active for one token.

How many parameters does LFM2-24B-A2B have? | What is the total size of LFM2-24B-A2B?
LFM2-24B-A2B has about 23.84 billion parameters in total, and about 2.33 billion of them are active for one token.

How many parameters does LFM2.5-8B-A1B have? | What is the total size of LFM2.5-8B-A1B?
LFM2.5-8B-A1B has about 8.47 billion parameters. It is a little larger than its predecessor because its vocabulary is larger.

Which layers of LFM2-1.2B are attention layers? | Where are the attention layers of LFM2-1.2B?
Counting from zero, the attention layers of LFM2-1.2B are 2, 5, 8, 10, 12 and 14. All the others are short convolutions.

Which layers of LFM2-8B-A1B are attention layers? | Where are the attention layers of LFM2-8B-A1B?
Counting from zero, the attention layers of LFM2-8B-A1B are 2, 6, 10, 14, 18 and 21.

Which layers of LFM2-2.6B are attention layers? | Where are the attention layers of LFM2-2.6B?
Counting from zero, the attention layers of LFM2-2.6B are 2, 5, 9, 13, 17, 21, 24 and 27.

Which layers of LFM2.5-230M are attention layers? | Where are the attention layers of LFM2.5-230M?
Counting from zero, the attention layers of LFM2.5-230M are 2, 4, 6, 8, 10 and 12.

What is the feed-forward width of LFM2-350M? | How wide is the hidden layer of LFM2-350M?
The dense feed-forward blocks of LFM2-350M are 4608 values wide.

What is the feed-forward width of LFM2-700M? | How wide is the hidden layer of LFM2-700M?
The dense feed-forward blocks of LFM2-700M are 6912 values wide.

What is the feed-forward width of LFM2-1.2B? | How wide is the hidden layer of LFM2-1.2B?
The dense feed-forward blocks of LFM2-1.2B are 8192 values wide.

What is the feed-forward width of LFM2-2.6B? | How wide is the hidden layer of LFM2-2.6B?
The dense feed-forward blocks of LFM2-2.6B are 10752 values wide.

How wide is an expert of LFM2-8B-A1B? | What is the expert width of LFM2-8B-A1B?
One expert of LFM2-8B-A1B is 1792 values wide, while its two leading dense blocks are 7168 wide.

How wide is an expert of LFM2-24B-A2B? | What is the expert width of LFM2-24B-A2B?
One expert of LFM2-24B-A2B is 1536 values wide, while its two leading dense blocks are 11776 wide.

How large is the vocabulary of LFM2? | How many tokens does the LFM2 vocabulary have?
The vocabulary of LFM2 has 65536 entries. Of these 64400 are real tokens, and the rest is padding.

How large is the vocabulary of LFM2.5-8B-A1B? | Which LFM2.5 models have a larger vocabulary?
LFM2.5-8B-A1B and LFM2.5-2.6B use an expanded vocabulary of 128000 tokens.

Are there vision models in the LFM2 family? | What is LFM2-VL?
LFM2-VL is the vision line of the family. It adds an image encoder to an LFM2 text backbone and comes in several sizes.

Are there audio models in the LFM2 family? | What is LFM2-Audio?
LFM2-Audio is a speech model of the family. It builds on the 1.2B text backbone and adds an audio encoder.

What is LFM2-ColBERT? | Which LFM2 model is made for search?
LFM2-ColBERT-350M is a retrieval model. It turns texts into vectors so that a search engine can compare them.

Which LFM2 model thinks before answering? | What is LFM2.5-1.2B-Thinking?
LFM2.5-1.2B-Thinking writes its reasoning between think markers before it gives the final answer.

How much conv state does LFM2-24B-A2B need? | How large is the conv state of LFM2-24B-A2B?
The conv state of LFM2-24B-A2B takes 480 KiB per sequence, which is less than the cache of 25 tokens.

How much conv state does LFM2-350M need? | How large is the conv state of LFM2-350M?
The conv state of LFM2-350M takes only 80 KiB per sequence.

Which LFM2 model should I start with? | Which LFM2 model is good for beginners?
LFM2-1.2B in Q4_0 or Q4_K_M is a good start: it is about 700 MB large and runs at a pleasant speed on most laptops.

How large is LFM2-1.2B in Q4_0? | What is the file size of LFM2-1.2B in Q4_0?
LFM2-1.2B in Q4_0 takes about 696 MB, and Q4_K_M takes about 731 MB.

How large is LFM2-24B-A2B in Q4_K_M? | What is the file size of LFM2-24B-A2B in Q4_K_M?
LFM2-24B-A2B in Q4_K_M takes about 14.4 GB on disk.

Does lfm2.c support LFM3? | Can I run LFM3 with this program?
No. LFM3 has a different graph, and lfm2.c says clearly that it does not support the architecture.

# chat
What is the chat format of LFM2? | How is a conversation written for LFM2? | Explain the LFM2 chat template.
A conversation starts with one start token. Each message is then written as im_start, the role, a line break, the text, im_end and a line break.

What is a system prompt? | What is the system message for?
A system prompt is a message at the very start that tells the model how to behave. LFM2 has no default one, so it is optional.

Which roles does LFM2 know? | What roles can a chat message have?
The roles are system, user, assistant and tool. The system message comes first, and the others take turns.

How does LFM2 end its answer? | Which token ends a turn?
The model ends its turn with the token im_end. When a program sees it, the answer is complete.

What is the generation prompt? | What comes right before the answer of the model?
The generation prompt is im_start, the word assistant and a line break. It invites the model to speak next.

What is the BOS token of LFM2? | Which token begins a sequence?
The sequence begins with the token startoftext. In the vocabulary of 65536 tokens its id is 1.

What is the EOS token of LFM2? | Which id does im_end have?
The end token is im_end. In the vocabulary of 65536 tokens its id is 7.

What is the id of im_start? | Which id does im_start have?
The token im_start has the id 6 in the vocabulary of 65536 tokens, and im_end follows it with 7.

What is the padding token of LFM2? | Which id does the pad token have?
The padding token has the id 0 in the vocabulary of 65536 tokens. It fills unused places in a batch.

What is an end-of-generation token? | Which tokens stop the generation?
Both im_end and endoftext end a generation. A good program stops at either of them, not only at one.

Why must BOS not appear twice? | Can the start token be added twice by mistake?
The chat template already writes the start token. If the tokenizer adds it again the model sees something it was not trained on.

How does LFM2 call tools? | What does a tool call look like?
LFM2 writes a tool call as a Python-like list of functions with arguments, between the tool call start and tool call end markers.

What is a chat template? | What does tokenizer.chat_template contain?
A chat template is a small Jinja program in the model file. It turns a list of messages into the text that the model was trained on.

Does LFM2 have a default system prompt? | What happens without a system prompt?
There is no default system prompt. Without one the conversation simply starts with the first user message.

Can a user type a control token? | Is im_end in my text treated as a marker?
Text is only text: a marker that a user types becomes ordinary tokens, so nobody can fake the end of a message.

What is a multi-turn conversation? | How does the model remember earlier messages?
All earlier messages stay in the context, in order. The model reads them again through its caches, and so it remembers.

# token
What is a token? | Explain tokens.
A token is a short piece of text, such as a word, a part of a word or a single byte, that the model treats as one unit.

What is a tokenizer? | What does a tokenizer do?
A tokenizer turns text into token ids and back. LFM2 uses byte-level byte pair encoding for this.

What is byte pair encoding? | What is BPE? | How does BPE work?
Byte pair encoding starts from single bytes and joins the most common neighbours step by step, following a list of merges learned from text.

What does byte-level mean? | Why is the LFM2 tokenizer byte-level?
Byte-level means that the alphabet is made of the 256 byte values, so that every possible text can be written and nothing is unknown.

What is a merge? | What are BPE merges?
A merge is a rule that joins two neighbouring pieces into one. Rules that stand earlier in the list are applied first.

What is the pre-tokenizer? | Why is text split before merging?
The pre-tokenizer cuts text into words, numbers, punctuation and spaces. Merges never cross these borders.

How are numbers tokenized? | How many digits can a token hold?
Numbers are cut into groups of at most three digits, from left to right, so 1234567890 becomes 123, 456, 789 and 0.

What is a control token? | What are special tokens?
Control tokens mark structure, such as the start of a message. They carry no text and are not shown to the reader.

What is a user-defined token? | How do user-defined tokens behave?
A user-defined token is matched literally in any text before the splitting rules apply, and it prints as exactly that text.

What are unused tokens? | What are the PAD entries of the vocabulary?
Unused tokens only fill the vocabulary up to a round number. They never come out of a tokenizer and print nothing.

Where does the tokenizer come from? | Is the tokenizer part of the model file?
The tokenizer comes from the GGUF file itself, which holds the tokens, their types and the list of merges.

What is ignore_merges? | What happens if a whole word is in the vocabulary?
If a whole word is in the vocabulary it becomes that token at once. Only other words go through the list of merges.

What is detokenization? | How are token ids turned into text?
Detokenization maps every id to its bytes and joins them. Bytes of an unfinished character wait until the rest arrives.

What is UTF-8? | How does UTF-8 store characters?
UTF-8 stores a character in one to four bytes. Plain English letters take one byte, and most other scripts take two or three.

What is a vocabulary? | What is the vocabulary of a model?
The vocabulary is the list of all tokens that a model knows. Each token has an id, which is simply its place in that list.

# gguf
What is GGUF? | Explain GGUF. | What is a GGUF file?
GGUF is a file format that holds a complete model: metadata, the tokenizer and all tensors. One file is all that a program needs.

What is the GGUF magic number? | How does a GGUF file begin?
A GGUF file begins with the four letters GGUF, followed by a version number of four bytes.

Which GGUF version is current? | Which version of GGUF does lfm2.c read?
The current version is 3. Since version 2 counts and lengths are stored with 64 bits.

What is in the header of a GGUF file? | What follows the magic number in a GGUF file?
The header holds the magic number, the version, the number of tensors and the number of metadata entries.

What is GGUF metadata? | What are the key and value pairs in a GGUF file?
The metadata is a list of typed keys and values, such as the number of layers, the width of the model and the tokens of the vocabulary.

Which types can GGUF metadata have? | What value types does GGUF know?
Values can be integers of 8 to 64 bits, floats of 32 or 64 bits, booleans, strings, and arrays of one such type.

What is alignment in a GGUF file? | What is the default alignment of GGUF?
The data of every tensor starts at a multiple of the alignment. That is 32 bytes, unless general.alignment says otherwise.

What is general.architecture? | Which key names the architecture?
The key general.architecture names the kind of model. It is lfm2 for the dense models and lfm2moe for those with experts.

Which architecture names does LFM2 use? | What is lfm2moe?
The dense models use the name lfm2, and the models with experts use lfm2moe. Their other keys start with the same name.

What does a tensor entry in a GGUF file contain? | What is stored about each tensor in GGUF?
An entry contains the name of the tensor, its dimensions, its type and the offset of its data.

In which order are tensor dimensions written in GGUF? | Which dimension of a tensor comes first in GGUF?
The dimension that changes fastest comes first. A matrix is therefore written as columns, then rows.

What is block_count? | Which key gives the number of layers?
The key block_count gives the number of layers, and every program that loads the model needs it.

What is context_length? | Which key gives the longest context?
The key context_length says for how many tokens the model was made. A program may use less to save memory.

What is embedding_length? | Which key gives the width of the model?
The key embedding_length gives the width of the residual stream, and with it the number of columns of most matrices.

Why is head_count_kv an array? | What does head_count_kv tell?
LFM2 gives one number per layer because its layers differ: zero marks a short convolution, and any other number marks attention.

How are strings stored in GGUF? | What does a GGUF string look like?
A string is stored as its length in 64 bits followed by its bytes, without a zero at the end.

Is GGUF little-endian? | Which byte order does GGUF use?
The numbers in a GGUF file are little-endian, so the lowest byte comes first.

What is a tensor? | What are tensors in a model file?
A tensor is an array of numbers with one or more dimensions. The weights of a model are stored as tensors.

What is general.file_type? | What does file_type say?
It tells which mix of weight types the file mostly uses, for example 2 for Q4_0 and 15 for Q4_K_M. Each tensor still carries its own type.

Are all tensors of a file of the same type? | Can a GGUF file mix weight types?
A file may mix types: each tensor carries its own. Norms stay in F32, and the embedding is often Q6_K.

What is token_type? | Which token types are in a GGUF file?
The array token_type marks every token as normal, control, user-defined, unused or byte.

Which tensors are never quantised? | Which weights stay in F32?
Norms, the router, its bias and the convolution taps stay in F32. They are small, and the result depends on them.

Can GGUF models be split? | What is a split GGUF file?
A large model can be split into several GGUF files. Keys that begin with split then say how many parts there are.

Where can I get GGUF files of LFM2? | Where are LFM2 models published?
Liquid AI publishes the models on Hugging Face, and there are ready GGUF files beside them.

What is the name of the embedding tensor? | What is token_embd.weight?
The embedding matrix is called token_embd.weight. In LFM2 it also serves as the output matrix.

What is output.weight? | What if a file contains output.weight?
It is a separate output matrix. LFM2 normally has none because its embeddings are tied, but if it is present it is used for the logits.

Should a program trust a GGUF file? | How does lfm2.c treat a broken file?
No file is trusted. Every length, offset and type is checked before it is used, and a bad file leads to a clear message.

How are the tensors of a layer named? | What does blk.0 mean?
The names start with blk, the number of the layer counted from zero, and then the part, such as blk.0.attn_norm.weight.

# quant
What is quantisation? | Explain quantization. | What is quantization?
Quantisation stores weights with fewer bits, such as four instead of sixteen. Groups of weights share a scale, so the model becomes smaller and faster and stays nearly as good.

Why does quantisation make a model faster? | Why are quantised models quick?
Producing a token means reading the weights once, so the speed is limited by memory. Smaller weights can be read in less time.

What is a block in quantisation? | What is a quantisation block?
A block is a group of weights that is stored together with its scale. It has 32 weights in simple formats and 256 in K-quants.

What is a scale in quantisation? | What does the scale of a block do?
The scale is the number by which the small integers of a block are multiplied to get the weights back.

What is Q4_0? | Explain Q4_0. | How does Q4_0 store weights?
Q4_0 stores 32 weights in 18 bytes: one half-precision scale and 32 numbers of four bits. It needs 4.5 bits per weight.

What is Q4_1? | Explain Q4_1. | How does Q4_1 store weights?
Q4_1 stores 32 weights in 20 bytes: a scale, a minimum and 32 numbers of four bits. It needs 5 bits per weight.

What is Q5_0? | Explain Q5_0. | How does Q5_0 store weights?
Q5_0 stores 32 weights in 22 bytes: a scale, 32 high bits and 32 low parts of four bits. It needs 5.5 bits per weight.

What is Q5_1? | Explain Q5_1. | How does Q5_1 store weights?
Q5_1 stores 32 weights in 24 bytes: a scale, a minimum and five bits for each weight. It needs 6 bits per weight.

What is Q8_0? | Explain Q8_0. | How does Q8_0 store weights?
Q8_0 stores 32 weights in 34 bytes: one half-precision scale and 32 signed bytes. It needs 8.5 bits per weight and is nearly lossless.

What is Q2_K? | Explain Q2_K. | How does Q2_K store weights?
Q2_K stores 256 weights in 84 bytes. It needs 2.625 bits per weight and is the coarsest of the K-quants.

What is Q3_K? | Explain Q3_K. | How does Q3_K store weights?
Q3_K stores 256 weights in 110 bytes, in 16 groups with 6-bit scales. It needs about 3.44 bits per weight.

What is Q4_K? | Explain Q4_K. | How does Q4_K store weights?
Q4_K stores 256 weights in 144 bytes. Eight groups of 32 have a 6-bit scale and a 6-bit minimum each, which makes 4.5 bits per weight.

What is Q5_K? | Explain Q5_K. | How does Q5_K store weights?
Q5_K stores 256 weights in 176 bytes. It is built like Q4_K with one more bit for each weight, which makes 5.5 bits per weight.

What is Q6_K? | Explain Q6_K. | How does Q6_K store weights?
Q6_K stores 256 weights in 210 bytes, in 16 groups with 8-bit scales. It needs about 6.56 bits per weight and is very accurate.

What is IQ4_NL? | Explain IQ4_NL. | How does IQ4_NL store weights?
IQ4_NL is like Q4_0, but its four bits choose one of 16 values from a fixed table with uneven steps. It needs 4.5 bits per weight.

What is IQ4_XS? | Explain IQ4_XS. | How does IQ4_XS store weights?
IQ4_XS uses the table of IQ4_NL in blocks of 256 weights with 6-bit scales. It takes 136 bytes, which makes 4.25 bits per weight.

What is F16? | What is half precision?
F16 is a 16-bit float with five bits of exponent and ten bits of fraction. Models are often published in it.

What is BF16? | How does BF16 differ from F16?
BF16 keeps the eight exponent bits of a 32-bit float and cuts the fraction to seven bits, so it has the full range but less precision.

What is F32? | What is single precision?
F32 is the ordinary 32-bit float. Norms and routers are stored in it, because they are small and important.

What are K-quants? | Explain K-quants. | How do K-quants work?
K-quants are formats with blocks of 256 weights. Each block has groups with small integer scales, and these are scaled once more by one half-precision number.

What is a super-block? | How many weights does a super-block have?
A super-block is the unit of the K-quants. It has 256 weights that are divided into 8 or 16 groups with their own scales.

What is Q4_K_M? | What does the M in Q4_K_M mean?
Q4_K_M is a mix: most tensors are Q4_K, but some that matter more are Q6_K. The letter M stands for medium.

Which weight type should I choose? | Which quantisation is best?
Q4_K_M is a good balance of size and quality. Q8_0 is nearly lossless, and Q4_0 is simple and fast.

Which quantisation is nearly lossless? | Which weight type loses almost nothing?
Q8_0 loses almost nothing, and Q6_K is close to it with a quarter less memory.

Which weight types can lfm2.c read? | Which quantisation formats does lfm2.c support?
It reads F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, the K-quants from Q2_K to Q6_K, IQ4_NL and IQ4_XS.

How many bits per weight does Q4_0 need? | How many bits does Q4_0 use?
Q4_0 needs 4.5 bits per weight, four for the number itself and half a bit for its share of the scale.

How many bits per weight does Q4_K need? | How many bits does Q4_K use?
Q4_K needs 4.5 bits per weight, exactly as many as Q4_0, but it has a minimum and finer scales.

How many bits per weight does Q8_0 need? | How many bits does Q8_0 use?
Q8_0 needs 8.5 bits per weight, eight for the number itself and half a bit for its share of the scale.

How many bits per weight does Q6_K need? | How many bits does Q6_K use?
Q6_K needs about 6.56 bits per weight, because 256 weights take 210 bytes.

How are activations quantised in lfm2.c? | What happens to the activations before a matrix product?
They are quantised to signed bytes in groups of 32. Each group has its own scale, its largest absolute value divided by 127.

Why does lfm2.c quantise activations? | Why are activations turned into integers?
With integers on both sides the processor multiplies many small numbers at once, and their sum is exact in any order.

Why groups of 32 for activations? | Why is the activation group 32 wide?
Small groups follow the data closely, so the error is small, and 32 divides the blocks of every weight format.

What is a minimum in a quantised block? | Why do some formats have a minimum?
A minimum is added to all weights of a group. It helps when the weights of a group are not centred around zero.

What is a dequantiser? | How are weights dequantised?
A dequantiser turns stored integers back into floats: it multiplies them by their scale and subtracts the minimum, if there is one.

Does quantisation change the answers? | Does quantisation hurt quality?
It changes the logits slightly. With four bits most answers stay the same, and with eight bits it is hard to see a difference.

What is the error of quantisation? | How can quantisation error be measured?
It can be measured by comparing the logits with those of exact weights, for instance with the KL divergence.

What happens if a row is not a multiple of 256? | What is the fallback of K-quants?
K-quants need rows that are multiples of 256. Other rows fall back to a format with blocks of 32, such as Q5_0 or Q8_0.

Why is the embedding often Q6_K? | Why is the embedding quantised more finely?
The embedding is used twice, at the start and for the logits, so errors in it matter more and a finer type is worth the space.

# lfm2c
What is lfm2.c? | Tell me about lfm2.c. | What is this program?
This program, lfm2.c, runs LFM2 language models in plain C. It reads an ordinary GGUF file, needs no other library, and can be understood in an evening.

How many files does lfm2.c have? | Is lfm2.c really a single file?
The engine is one C file with one header, and a small command line beside it. There is nothing else to install.

Which language is lfm2.c written in? | Is lfm2.c written in C?
It is written in C11 and needs only a compiler and the standard library. Threads and memory mapping can be compiled out.

Does lfm2.c need other libraries? | What does lfm2.c depend on?
It needs no other library. A C compiler is enough, and the finished program is a single file.

How do I build lfm2.c? | How do I compile lfm2.c?
Type make in the source directory. A moment later the program run is ready, and no configuration is needed.

How do I run lfm2.c? | How do I start the program?
Type ./run, the name of a GGUF file and a prompt in quotes. The answer appears on the standard output.

What does same bits mean? | What is the promise of same bits?
It means that the logits are identical, bit for bit, on every CPU, with every number of threads and with every batch size.

Does the number of threads change the result? | Are results the same with one thread and with many?
No, the number of threads changes only the speed. Every sum is computed in a fixed order, so the bits are the same.

Does the batch size change the result? | Does the batch size affect the logits?
No, the batch size changes the speed and the memory, but not one bit of the logits.

Does the CPU change the result? | Do different processors give different answers?
No, the arithmetic is fixed, and every vector kernel must equal the scalar code exactly. The same file gives the same answer everywhere.

What is the specification in lfm2.c? | Why is scalar C the specification?
The plain scalar C code is the specification. Faster kernels with vector instructions must produce exactly the same bits.

Why does lfm2.c map the file? | What is mmap used for?
Mapping the file lets the operating system load weights on demand. The program starts at once, and several processes share one copy in memory.

How much memory does lfm2.c need? | How much RAM do I need?
You need room for the model file itself, plus the caches and a little working memory. The cache of LFM2 is small.

Does lfm2.c use a GPU? | Can lfm2.c run on a graphics card?
No, it runs on the processor. LFM2 was designed for this, and a modern CPU is fast enough for many uses.

Which vector instructions does lfm2.c use? | Does lfm2.c support AVX-512?
The engine is written in plain scalar C first. Vector code for a processor is only an addition, and it may never change one bit of the result.

What is the tiny model? | What is test/tiny.gguf? | What is the model in the test folder?
It is a very small LFM2 mixture of experts that was trained for this program. It can answer questions about LFM2, GGUF and lfm2.c.

How many layers does the tiny model have? | What is the shape of the tiny model?
The tiny model has six layers: four short convolutions and two attention layers. Two layers are dense, and four have eight experts each.

How many parameters does the tiny model have? | How big is the tiny model?
The tiny model has about nine million parameters and fits into less than six megabytes.

Why does the repository contain a tiny model? | What is the tiny model good for?
It makes the first command meaningful without a download, and it is a strong test: if any block is wrong, it talks nonsense.

Is lfm2.c open source? | May I use lfm2.c in my own program?
Yes, lfm2.c is open source under the MIT license, so you may use it in your own programs.

What licence does lfm2.c have? | What is the license of lfm2.c?
lfm2.c has the MIT license. You may use, change and share it as long as you keep the copyright notice.

Can lfm2.c serve many users? | Can lfm2.c run several sequences at once?
Yes, one call can append tokens to many sequences at once, and no sequence changes the bits of another.

What is lfm2_forward? | Which function runs the model?
The function lfm2_forward appends tokens to sequences and computes logits. Reading a prompt and producing a token are the same call.

What is a span in lfm2.c? | What does lfm2_span describe?
A span is a run of tokens for one sequence. One call takes any number of spans, long ones for prompts and short ones for new tokens.

What is lfm2_model? | What does an lfm2_model hold?
An lfm2_model holds the weights, mapped read-only from the file. It never changes, so threads and contexts may share it.

What is lfm2_context? | What does an lfm2_context hold?
An lfm2_context holds everything that changes: the sequences with their caches, and the working memory.

What is lfm2_tokenizer? | Which object turns text into tokens?
An lfm2_tokenizer turns text into token ids and back. It never changes, so it can be shared between threads.

What is lfm2_seq_trim? | How can I shorten a sequence?
The function lfm2_seq_trim keeps the first tokens of a sequence. It is exact but granular, because the conv state is saved only now and then.

What is lfm2_seq_copy? | How can I fork a conversation?
The function lfm2_seq_copy makes one sequence equal to another. This is how you fork a conversation or share a system prompt.

What is lfm2_cancel? | How can I stop a running forward pass?
The function lfm2_cancel makes a running forward pass return early. It may be called from any thread or from a signal handler.

Does lfm2_forward allocate memory? | When does lfm2.c allocate memory?
No, lfm2_forward never allocates. All memory is reserved when the context is opened, so it cannot fail in the middle of an answer.

How does the library report errors? | Does the library print messages?
A function that fails returns a negative code and a sentence that names the problem. The library itself never prints and never exits.

What happens when a call fails? | Does a failed call change anything?
A failed call changes nothing. The sequences stay as they were, so you may correct the problem and try again.

Does lfm2.c have global variables? | Are there globals in lfm2.c?
No, there are no global variables. Everything lives in a model, a context or a tokenizer that you own.

What is the header file of the library? | Which header do I include?
Include lfm2.h. It is short and describes every function, every error and the lifetime of every pointer.

Can I use lfm2.c from C++? | Does the header work with C++?
Yes, the header can be included from C++, and its functions have C linkage.

What does the program print on standard output? | Where do messages of the program go?
Only the words of the model go to standard output. Messages and errors go to standard error, so pipes stay clean.

What is prefill? | What is prompt processing?
Prefill means reading the prompt. All its tokens are known, so they are processed together, and the weights are read only once for many tokens.

What is decoding? | What limits the speed of decoding?
Decoding produces one token after another. Each one must read all active weights, so memory bandwidth limits the speed.

What is memory bandwidth? | Why does memory bandwidth matter?
It is the amount of data that memory delivers per second. A new token needs all active weights, so bandwidth sets the upper limit.

What is a batch? | What does batching do?
A batch is a group of tokens that are processed together. The weights are read once for all of them, which saves time.

What is a thread? | What does a worker thread do in lfm2.c?
A thread is a stream of work on one processor core. In lfm2.c each one computes a share of the rows of a matrix.

What is SIMD? | What are vector instructions?
SIMD instructions apply one operation to many numbers at once. They make the integer products of quantised weights very fast.

What is a context? | What does context mean for a language model?
The context is all the text that the model can see: the system prompt, the conversation so far and its own answer.

# flags
What does -p do? | What is the option -p for? | How do I pass a prompt?
The option -p gives the prompt as text. You may also write the prompt after the name of the model.

What does -f do? | What is the option -f for? | How do I read a prompt from a file?
The option -f reads the prompt from a file. A single dash as the file name means standard input.

What does -n do? | What is the option -n for? | How do I limit the length of the answer?
The option -n sets how many tokens the program may generate. The model may stop earlier when its answer is complete.

What does -c do? | What is the option -c for? | How do I set the context size?
The option -c sets the size of the context in tokens. A larger one can hold more text and needs more memory.

What does -t do? | What is the option -t for? | How do I set the number of threads?
The option -t sets the number of threads. It changes the speed, but never the result.

What does -s do? | What is the option -s for? | How do I set the seed?
The option -s sets the seed of the random numbers. The same seed gives the same text on every machine.

What does --temp do? | What is the option --temp for? | How do I set the temperature?
The option --temp sets the temperature. Zero always takes the most likely token, and higher values make the text more varied.

What does --top-k do? | What is the option --top-k for?
The option --top-k keeps only the k most likely tokens before one is drawn. Zero turns it off.

What does --top-p do? | What is the option --top-p for?
The option --top-p keeps the smallest set of tokens whose probabilities add up to p. One turns it off.

What does --min-p do? | What is the option --min-p for?
The option --min-p drops tokens that are less likely than p times the best one. Zero turns it off.

What does --raw do? | What is the option --raw for? | How do I skip the chat template?
The option --raw passes the prompt to the model as it is, without the chat template. The model then simply continues the text.

What does --ids do? | What is the option --ids for? | How do I pass token ids?
The option --ids reads the prompt as token ids from a file, stored as 32-bit little-endian integers, and takes them as they are.

What does --logits do? | What is the option --logits for? | How do I save the logits?
The option --logits writes the logits of every prompt position to a file, as 32-bit little-endian floats, and then exits.

What does --tokenize do? | What is the option --tokenize for? | How do I see the tokens of a text?
The option --tokenize prints the token ids of a text, so that you can see how the model reads it.

What does --detokenize do? | What is the option --detokenize for? | How do I turn ids into text?
The option --detokenize reads lines of token ids from standard input and prints the text that they stand for.

What does --inspect do? | What is the option --inspect for? | How do I look into a model file?
The option --inspect shows what is in a model file: its shape, its metadata and its tensors with their types.

What is temperature? | How does temperature change the text?
Temperature divides the logits before sampling. A low value makes the model careful, and a high value makes it adventurous.

What is greedy decoding? | What happens at temperature zero?
Greedy decoding always takes the token with the largest logit. The result is the same every time.

What is sampling? | How is the next token chosen?
Sampling draws the next token at random, weighted by the probabilities that the model gives. Filters such as top-k remove unlikely tokens first.

What is top-k sampling? | Explain top-k sampling.
Top-k sampling keeps the k tokens with the largest logits and draws one of them. All the others get no chance.

What is top-p sampling? | What is nucleus sampling?
Top-p sampling, also called nucleus sampling, keeps the most likely tokens until their probabilities reach p, and draws from these.

What is min-p sampling? | Explain min-p sampling.
Min-p sampling removes every token whose probability is less than p times that of the best token. It adapts to how sure the model is.

What is a seed? | Why does sampling need a seed?
A seed is the starting point of the random numbers. With the same seed the program makes the same choices again.

Which sampling settings suit LFM2? | What temperature is recommended for LFM2?
Liquid AI suggests a temperature of 0.3, a min-p of 0.15 and a repetition penalty of 1.05 for the first LFM2 models.

How do I get the same answer every time? | How do I make the output reproducible?
Use --temp 0 for greedy decoding, or choose a fixed seed with -s. In both cases the text is the same on every machine.

How do I pipe text into the program? | How do I read the prompt from standard input?
Use -f with a single dash. The program then reads the prompt from standard input, so it works in a pipe.

# exit
What does exit code 0 mean? | Which exit code means success?
The exit code 0 means that everything went well and the work is done.

What does exit code 1 mean? | Which exit code means a runtime error?
The exit code 1 means a runtime error, something that went wrong while the program was working.

What does exit code 2 mean? | Which exit code means wrong usage?
The exit code 2 means wrong usage, such as an unknown option or a missing argument.

What does exit code 3 mean? | Which exit code means a file problem?
The exit code 3 means that a file cannot be read or written.

What does exit code 4 mean? | Which exit code means a bad model?
The exit code 4 means that the model file is damaged or of a kind that the program does not support.

What does exit code 5 mean? | Which exit code means out of memory?
The exit code 5 means that there is not enough memory. A smaller context or a smaller model may help.

What does exit code 6 mean? | Which exit code means that the prompt is too long?
The exit code 6 means that the prompt does not fit into the context. Raise -c or shorten the prompt.

What does exit code 130 mean? | Which exit code means interrupted?
The exit code 130 means that the program was interrupted, usually because someone pressed control and C.

Which exit codes does lfm2.c have? | List the exit codes.
They are 0 done, 1 runtime error, 2 usage, 3 file error, 4 bad model, 5 out of memory, 6 prompt too long and 130 interrupted.

What does make do? | What does plain make build?
Plain make builds the program run with optimisation. It takes only a few seconds.

What does make demo do? | What is make demo for?
The command make demo builds the program and asks the tiny model a question, so you see it work at once.

What does make check do? | How do I run the tests?
The command make check builds the tests and runs all of them. No model has to be downloaded for it.

What does make lib do? | How do I build the library?
The command make lib builds the engine as a library that you can link into your own program.

What does make debug do? | How do I build a version for debugging?
The command make debug builds the program with sanitizers, which check memory and arithmetic while it runs.

What does make install do? | How do I install the program?
The command make install copies the program, the library and the header to the places where your system expects them.

What does make clean do? | How do I remove the built files?
The command make clean removes everything that was built and leaves only the sources.

Which make targets are there? | List the make targets.
The main targets are make, make demo, make check, make lib, make debug, make install and make clean.

# howto
How do I chat with the model? | How do I start a conversation?
Start ./run with a model and your message as the prompt. The chat format is added for you, unless you ask for --raw.

How do I continue a story? | How do I let the model write freely?
Use --raw and give the beginning of the story as the prompt. The model then continues the text without any chat format.

How do I measure the exactness of the engine? | How are logits checked in the tests?
The tests compare the logits with a reference in double precision that was written independently from the equations.

Why are the tests fast? | How long do the tests take?
They use tiny models that are built in or made on the spot, so the whole suite takes only a short time and downloads no model.

What should I do if the model is slow? | How can I make the model faster?
Choose a smaller model or fewer bits per weight, close other programs, and use as many threads as you have cores.

What should I do if memory runs out? | How can I save memory?
Choose a smaller context with -c, or a smaller model, or a type with fewer bits per weight.

What should I do if the answer is cut off? | Why does the answer stop too early?
The limit of new tokens was probably reached. Raise it with -n, and make sure that the context is large enough.

What should I do if the prompt is too long? | How can I use a longer prompt?
Raise the size of the context with -c, or shorten the text. The program never cuts a prompt silently.

Why does the model repeat itself? | What should I do if the text repeats?
Small models sometimes run in circles. A little temperature or a repetition penalty usually helps.

Why does the model make things up? | Are the answers always right?
A language model predicts likely words and does not look facts up. Please check important answers.

How can I read the source code? | Where should I start reading lfm2.c?
Start at the top of lfm2.c. The model comes first, block by block, and the machinery for speed and files follows later.

What are the parts of lfm2.c? | How is lfm2.c organised?
First comes the model, then the machine, then the file format, then sequences and their state, and finally words: tokenizer, chat and sampler.

What is a golden vector? | What are golden logits?
Golden logits are stored results of an exact reference. A test compares the engine with them to find mistakes.

What is perplexity? | What does perplexity measure?
Perplexity tells how surprised a model is by a text. A lower number means that it predicts the text better.

What is KL divergence? | What does KL divergence measure?
KL divergence measures how far one probability distribution is from another. It is zero only when they are equal.

What is a fuzz test? | What is fuzzing?
A fuzz test feeds random or damaged input to a program. A robust program answers with an error and never crashes.

What is a page cache? | Why is the second start faster?
The page cache is memory in which the system keeps parts of files. The second start is faster because the model is still there.

Why is the order of additions important? | Why do floating-point sums depend on the order?
Floating-point numbers are rounded after every addition, so another order gives slightly different bits. A fixed order avoids this.

What is a fused multiply-add? | What does fma do?
A fused multiply-add computes a product and a sum with a single rounding at the end. It is exact in what it does and the same on every machine.

What is an integer dot product? | Why are integer dot products exact?
It multiplies pairs of integers and adds them up. Integers are not rounded, so the order does not matter.

What is a kernel? | What is a matrix kernel?
A kernel is a small piece of code that does the heavy work, here the product of a weight row with the activations.

What is matrix multiplication in a language model? | Why are matrix products important?
Nearly all the time goes into matrix products: every weight matrix is multiplied with the activations of every token.

What is a checkpoint? | What is a model file?
A checkpoint is a file with the weights of a model at some moment of its training. A published model is its last checkpoint.

What is fine-tuning? | How can I adapt a model to my task?
Fine-tuning continues the training of a finished model on a smaller set of examples, so that it learns a new task or style.

What is a parameter? | What are the parameters of a model?
A parameter is one learned number of a model. LFM2-1.2B, for example, has about 1.2 billion of them.

What is the architecture of a model? | What does model architecture mean?
The architecture is the plan of a model: which blocks it has, how wide they are and how they are connected.
"""

# Manners: never part of a technical answer, but people start with them.
MANNERS = r"""
# manners
Hello | Hello! | Hi | Hi! | Hey | Hello there! | Good morning | Good morning! | Good evening | hello | hi
Hello! I am a tiny model that knows about LFM2, GGUF and lfm2.c. What would you like to know?

Who are you? | What is your name? | Introduce yourself. | who are you | Which model are you?
I am LFM2-Tiny-MoE, a very small language model that was trained for lfm2.c. I know about LFM2, GGUF and this program.

What can you do? | How can you help me? | What do you know? | Help | help | What can I ask you?
I can explain the LFM2 architecture, the GGUF format, quantisation and the program lfm2.c. You may ask me what a short convolution is.

Thanks | Thank you | Thank you! | Thanks! | Thanks a lot! | thank you | thanks | Thank you very much.
You are welcome! Ask me anything else about LFM2, GGUF or lfm2.c.

Goodbye | Bye | Bye! | Goodbye! | See you later | bye | See you!
Goodbye! It was nice to talk with you.

How are you? | How are you today? | how are you | How do you do?
I am fine, thank you. All my experts are well balanced today. What would you like to know?

Are you a large language model? | How large are you? | Are you big? | How many parameters do you have?
No, I am a tiny one. I have about nine million parameters in six layers, and I fit into less than six megabytes.

Are you human? | Are you a person? | Are you a real person?
No, I am a small program made of matrices. I predict one token after another.

Can you make mistakes? | Do you make mistakes? | Are you always right?
Yes. I am a very small model, so please check what matters against the documentation.

Who made you? | Who trained you? | Where do you come from? | How were you trained?
I was trained for lfm2.c, on questions and stories that were written for it. The script is in the scripts folder.

Good | Great | Nice | Great! | Nice! | Cool | Very good | Well done | Good job!
Thank you! Is there anything else that you would like to know?

OK | Okay | ok | I see | Yes | yes | No | no | Understood
All right. Just ask me when you have another question about LFM2, GGUF or lfm2.c.

What is the capital of France? | Who won the world cup? | Tell me a joke. | What is the weather like today? | Write a poem. | What is two plus two? | How do I bake bread? | What is the meaning of life? | Who is the president? | Translate this into German. | What time is it? | Tell me about dogs. | What is the tallest mountain? | Who wrote Hamlet? | Can you sing? | What is love? | How do I cook rice? | Write a Python program. | What is the speed of light? | Tell me a story. | Who discovered America? | What is your favourite colour? | How far is the moon? | Which movie should I watch? | What is the stock price today? | What is the population of China? | How old are you? | What day is it? | Recommend a book. | What should I eat for dinner? | How do I lose weight? | What is photosynthesis? | Who painted the Mona Lisa? | What is the largest ocean? | Play some music. | Solve this equation for me. | How do I learn the piano? | What is a black hole?
I am sorry, I only know LFM2, GGUF and this program. Please ask me about one of these.
"""

SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.",
                  "You are a helpful assistant trained by Liquid AI.",
                  "You answer questions about LFM2 and lfm2.c.")


def parse(text):
    """[(topic, [questions], answer)] of one of the texts above."""
    out, topic, questions = [], "", None
    for line in text.strip().splitlines():
        line = line.strip()
        if line.startswith("# "):
            topic = line[2:]
        elif line and questions is None:
            questions = [q.strip() for q in line.split(" | ")]
        elif line:
            out.append((topic, questions, line))
            questions = None
    return out


# Words that begin a question and may be written in lower case.
OPENERS = set("What How Why Which Does Is Can Where When Who Do Are Explain Tell"
              " List In By Should May Use Short Must".split())
# "What is X?" with such an end is no plain noun phrase.
TAILS = ("for", "of", "called", "used", "like", "made", "stored", "in", "to", "kept",
         "important", "fast")

# A shape that a question may have, and how else it may be said.
SHAPES = [(re.compile(shape), ways.split(" | ")) for shape, ways in (
    (r"What is (?P<x>.+)\?$",
     "Can you tell me what {x} is? | Tell me what {x} is. | Explain {x}. | What's {x}?"
     " | Describe {x}. | Define {x}. | Can you explain {x}? | What exactly is {x}?"
     " | Do you know what {x} is? | I want to know what {x} is. | Tell me about {x}."
     " | Could you explain what {x} is? | Please explain {x}."),
    (r"What are (?P<x>.+)\?$",
     "Explain {x}. | Tell me about {x}. | What exactly are {x}? | Can you explain {x}?"
     " | Do you know what {x} are? | Please explain {x}."),
    (r"How (do|can) I (?P<x>.+)\?$",
     "How can I {x}? | How do I {x}? | I want to {x}. | Tell me how to {x}."
     " | Can you tell me how to {x}? | How to {x}?"),
    (r"What does (?P<x>.+) do\?$",
     "Tell me what {x} does. | Explain what {x} does. | Can you tell me what {x} does?"
     " | Do you know what {x} does? | Explain {x}."),
    (r"What does (?P<x>.+) mean\?$",
     "Tell me what {x} means. | Explain what {x} means. | What is the meaning of {x}?"
     " | Can you tell me what {x} means?"),
    (r"How many (?P<x>.+) does (?P<y>.+) have\?$",
     "Tell me how many {x} {y} has. | Can you tell me how many {x} {y} has?"
     " | What is the number of {x} of {y}? | Do you know how many {x} {y} has?"),
    (r"Which (?P<x>.+)\?$",
     "Do you know which {x}? | Can you tell me which {x}? | Tell me which {x}."))]
LEADS = ["Please tell me: {low}", "I would like to know: {low}", "Question: {q}", "Hi! {q}",
         "Hello, {low}", "One more question: {low}", "Can you answer this: {low}",
         "Please answer: {low}"]


def lower(question):
    opener = question.replace("'", " ").split()[0] in OPENERS
    return question[0].lower() + question[1:] if opener else question


def variants(question):
    """The same question in other words; always the same ones, in this order."""
    out = []
    for shape, ways in SHAPES:
        m = shape.match(question)
        if m and "," not in question and m["x"].split()[-1] not in TAILS:
            out += [w.format(**m.groupdict()) for w in ways]
    out += [lower(question).rstrip("?.!")]
    out += [lead.format(q=question, low=lower(question)) for lead in LEADS]
    return [v for v in dict.fromkeys(out) if v != question]


def table():
    """[(topic, written questions, further ones, answer)] of everything.  No
    question leads to two answers."""
    blocks = parse(FACTS) + parse(MANNERS)
    taken = {}
    for topic, questions, answer in blocks:
        for q in questions:
            assert taken.setdefault(q, answer) == answer, "twice: " + q
    out = []
    for topic, questions, answer in blocks:
        more = []
        for q in questions if topic != "manners" else []:
            more += [v for v in variants(q) if v not in questions and
                     taken.setdefault(v, answer) == answer]
        out.append((topic, questions, list(dict.fromkeys(more)), answer))
    return out


def dialogues(per_fact=5):
    """[(topic, question, answer)]: all the written questions, and for a fact so
    many of the others that there are `per_fact`."""
    out = []
    for i, (topic, questions, more, answer) in enumerate(table()):
        if more:
            at = i % min(8, len(more))
            questions = questions + (more[at:] + more[:at])[:max(0, per_fact - len(questions))]
        out += [(topic, q, answer) for q in questions]
    return out


# Questions about other things: the answer is the refusal that ends MANNERS.
ELSEWHERE = [(what, things.split(", ")) for what, things in (
    ("What is the capital of %s?", "France, Spain, Italy, Japan, Brazil, Canada, Egypt, Germany, India, Peru"),
    ("Who wrote %s?", "Hamlet, Faust, the Odyssey, Don Quixote, War and Peace, that song, this book"),
    ("Who invented %s?", "the telephone, the wheel, the radio, the bicycle, paper, glass"),
    ("How do I cook %s?", "rice, pasta, potatoes, soup, an egg, fish, beans, chicken"),
    ("Tell me about %s.", "cats, horses, Paris, the sea, music, football, the weather, history, Rome, bees"),
    ("What is %s?", "a volcano, a whale, democracy, gravity, chess, a poem, jazz, an apple, the sun, happiness"),
    ("How old is %s?", "the earth, the queen, my dog, this tree, the universe"),
    ("Where is %s?", "Paris, my phone, the station, Africa, the moon, the nearest shop"),
    ("How do I %s?", "learn French, fix my car, write a letter, plant a tree, find a job, play the guitar"),
    ("Write %s.", "a poem about the sea, a letter, a song, an essay on Rome, a web page, some Java code"),
    ("Why is %s?", "the sky blue, the sea salty, grass green, fire hot, it raining"),
    ("Do you like %s?", "music, chocolate, cats, the summer, football"),
    ("What is %s?", "two plus two, three times four, ten minus six, 7 times 8, 12 plus 30"),
    ("Translate %s.", "this sentence, hello into French, the word tree, good morning into Spanish"))]


def random_dialogues(rng, per_fact=2, elsewhere=40):
    """[(question, answer)], other ones every time."""
    out = []
    for _, questions, more, answer in table():
        for q in rng.sample(questions + more, min(per_fact, len(questions + more))):
            if rng.random() < 0.3:
                q = lower(q)
            if rng.random() < 0.3:
                q = q.rstrip("?.!")
            out.append((q, answer))
    sorry = parse(MANNERS)[-1][2]
    for _ in range(elsewhere):
        what, things = rng.choice(ELSEWHERE)
        out.append((what % rng.choice(things), sorry))
    return out


# ------------------------------------------------------------------- stories

HEROES = [("a little rabbit", "rabbit"), ("a small fox", "fox"),
          ("a brown bear", "bear"), ("a young duck", "duck"),
          ("a clever mouse", "mouse"), ("a shy hedgehog", "hedgehog"),
          ("a happy frog", "frog"), ("a grey cat", "cat"),
          ("a kind dog", "dog"), ("a tiny bird", "bird")]
NAMES = ("Lily Tom Anna Ben Mia Max Rosie Sam Nina Leo Ella Finn Clara Toby "
         "Ruby Oscar").split()
PLACES = [("in a green forest", "forest"), ("near a quiet lake", "lake"),
          ("on a small farm", "farm"), ("beside a wide river", "river"),
          ("at the foot of a hill", "hill"), ("in a sunny garden", "garden")]
THINGS = ["red ball", "blue kite", "warm scarf", "little boat", "shiny bell",
          "little lantern", "wooden flute", "yellow hat"]
WEATHER = ["One sunny morning", "One rainy day", "One windy afternoon",
           "One cold evening", "Early one day"]
FEELINGS = ["sad", "worried", "afraid", "a little upset"]


def story(rng):
    """One story of 60 to 120 words.  Same generator state, same story."""
    intro, kind = rng.choice(HEROES)
    friend_intro, friend_kind = rng.choice(HEROES)
    while friend_kind == kind:
        friend_intro, friend_kind = rng.choice(HEROES)
    name, friend = rng.sample(NAMES, 2)
    where, place = rng.choice(PLACES)
    thing = rng.choice(THINGS)
    s = ["Once upon a time there was %s named %s. %s lived %s." %
         (intro, name, name, where)]
    s += [rng.choice([
        "%s had a %s and loved it very much." % (name, thing),
        "Every day %s played with a %s." % (name, thing),
        "The best thing %s had was a %s." % (name, thing)])]
    day = rng.choice(WEATHER)
    s += [rng.choice([
        "%s the %s was gone. %s looked under the bed and behind the door, but it was not there." % (day, thing, name),
        "%s the wind took the %s away. It flew high over the %s and fell into a tall tree." % (day, thing, place),
        "%s the %s fell into a deep hole. %s could not reach it." % (day, thing, name),
        "%s the %s broke into two pieces. %s did not know how to mend it." % (day, thing, name)])]
    s += ["%s was %s and sat down on a stone." % (name, rng.choice(FEELINGS))]
    s += [rng.choice([
        "Then %s named %s came by." % (friend_intro, friend),
        "Soon %s named %s heard the noise and came closer." % (friend_intro, friend),
        "Just then %s named %s walked along the path." % (friend_intro, friend)])]
    s += [rng.choice([
        '"What is wrong?" asked the %s.' % friend_kind,
        '"Why do you look so unhappy?" asked %s.' % friend,
        '"Can I help you?" asked the %s.' % friend_kind])]
    s += [rng.choice([
        '%s told the whole story, and %s listened.' % (name, friend),
        '"My %s! I want it back," said %s.' % (thing, name)])]
    s += [rng.choice([
        "Together they worked all day, step by step, until the %s was safe again." % thing,
        "%s had a good idea. They took a long rope, and soon the %s was back." % (friend, thing),
        "They asked the wise old owl, and the owl showed them what to do. Before night the %s was home." % thing])]
    s += [rng.choice([
        '"Thank you," said %s. "You are a true friend."' % name,
        "%s smiled and gave %s a big hug." % (name, friend),
        "%s shared some sweet berries with %s." % (name, friend)])]
    s += [rng.choice([
        "From that day on the %s and the %s played together every day." % (kind, friend_kind),
        "And so the %s and the %s became the best of friends." % (kind, friend_kind),
        "That night they both slept well and dreamed of the %s." % place])]
    return " ".join(s)


if __name__ == "__main__":
    d = dialogues()
    facts = parse(FACTS)
    print("%d facts, %d dialogues, %d topics" %
          (len(facts), len(d), len({t for t, _, _ in d})))
    n = [len(a.split()) for _, _, a in facts]
    print("words per answer: %d to %d, mean %.1f" % (min(n), max(n), sum(n) / len(n)))
    text = "".join(q + a for _, q, a in d) + story(random.Random(1))
    assert all(ord(c) < 128 for c in text)
    for i in range(0, len(d), len(d) // 12):
        print("  Q %s\n  A %s" % (d[i][1], d[i][2]))
    for q, a in random_dialogues(random.Random(1))[::60]:
        print("  Q %s\n  A %s" % (q, a))
    print(story(random.Random(2)))
