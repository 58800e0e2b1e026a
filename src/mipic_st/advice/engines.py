"""Settings of search engines that store vectors in a cell, one line each."""

from __future__ import annotations

# By precision: engine and setting. Only what keeps float queries against the stored vectors, as they were measured.
_SETTINGS: dict[str, dict[str, str]] = {
    "float32": {
        "sentence-transformers": "SentenceTransformer(path, truncate_dim={dim})",
        "faiss": 'faiss.index_factory({dim}, "Flat", faiss.METRIC_INNER_PRODUCT)',
        "pgvector": "vector({dim})",
        "Qdrant": "VectorParams(size={dim}, distance=Distance.COSINE)",
    },
    "float16": {
        "sentence-transformers": 'model.encode_document(texts, truncate_dim={dim}).astype("float16")',
        "faiss": 'faiss.index_factory({dim}, "SQfp16", faiss.METRIC_INNER_PRODUCT)',
        "pgvector": "halfvec({dim})",
        "Qdrant": "VectorParams(size={dim}, distance=Distance.COSINE, datatype=Datatype.FLOAT16)",
    },
    "int8": {
        "sentence-transformers": 'quantize_embeddings(vectors, "int8", ranges=ranges)',
        "faiss": 'faiss.index_factory({dim}, "SQ8", faiss.METRIC_INNER_PRODUCT)',
        "Qdrant": "ScalarQuantization(scalar=ScalarQuantizationConfig(type=ScalarType.INT8, quantile=0.994))",
        "Elasticsearch": '"type": "dense_vector", "dims": {dim}, "index_options": {{"type": "int8_hnsw"}}',
    },
    "int4": {
        "faiss": 'faiss.index_factory({dim}, "SQ4", faiss.METRIC_INNER_PRODUCT)',
        "Elasticsearch": '"type": "dense_vector", "dims": {dim}, "index_options": {{"type": "int4_hnsw"}}',
    },
    "binary": {
        "faiss": 'faiss.index_factory({dim}, "RaBitQ", faiss.METRIC_INNER_PRODUCT)  # 8 bytes more each',
        "Qdrant": "BinaryQuantization(binary=BinaryQuantizationConfig(always_ram=True))",
        "pgvector": "bit({dim}) with <~> (bits against bits: finds less than was measured, so rescore)",
    },
}


def engine_lines(dim: int, precision: str) -> list[str]:
    """One line per engine that knows the precision."""
    settings = {name: text.format(dim=dim) for name, text in _SETTINGS[precision].items()}
    if precision == "int4" and dim % 2:  # it packs two values into a byte and takes even dims only
        del settings["Elasticsearch"]
    wide = max(map(len, settings))
    return [f"{name.ljust(wide)}  {text}" for name, text in settings.items()]
