"""The collection's tiny GPT written for PyTorch: the oracle for its forward pass and gradients."""
import torch
import torch.nn.functional as F


def tensors(model, requires_grad=False):
    """The weights of a GPT (Values or floats) as float64 tensors."""
    numbers = {name: [[getattr(x, "data", x) for x in row] for row in matrix]
               for name, matrix in model.weights.items()}
    return {name: torch.tensor(matrix, dtype=torch.float64, requires_grad=requires_grad)
            for name, matrix in numbers.items()}


def forward(w, tokens, n_layers, n_heads, start=0):
    """tokens [n], the first at position `start` -> logits [n, vocab_size], all positions at once."""
    n, d_model = len(tokens), w["token"].shape[1]
    x = w["token"][torch.tensor(tokens)] + w["position"][start:start + n]

    def norm(x):
        return F.rms_norm(x, (d_model,), eps=1e-5)

    def heads(x):
        return x.view(n, n_heads, d_model // n_heads).transpose(0, 1)

    for i in range(n_layers):
        q, k, v = (heads(norm(x) @ w[f"{part}{i}"].T) for part in ("query", "key", "value"))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.transpose(0, 1).reshape(n, d_model) @ w[f"out{i}"].T
        x = x + F.relu(norm(x) @ w[f"up{i}"].T) @ w[f"down{i}"].T
    return norm(x) @ w["logits"].T


def loss(w, names, n_layers, n_heads):
    """Mean cross-entropy over all the letters of the names."""
    losses = [F.cross_entropy(forward(w, name[:-1], n_layers, n_heads), torch.tensor(name[1:]),
                              reduction="sum") for name in names]
    return sum(losses) / sum(len(name) - 1 for name in names)
