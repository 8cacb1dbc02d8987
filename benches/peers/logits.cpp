// Writes the logits of llama.cpp at every position of given token sequences, so that another engine
// can be held against them number by number.
//
//     logits MODEL.gguf DOCUMENTS OUT.f32 [THREADS]
//
// DOCUMENTS is a run of documents, each a u32 count and that many u32 token ids, little-endian. OUT
// gets one row of f32 logits per token, in the same order. Every document starts from an empty cache.
//
// The cache is f32 and flash attention is off: what is compared is the meaning of the file, not the
// shortcuts of an engine. The products are those of the ggml it is linked against; see llamacpp.sh.

#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

namespace {

using Document = std::vector<llama_token>;

// ggml hands a product to BLAS from this many tokens on, and rounds activations below it.
constexpr size_t SHORTEST_EXACT_BATCH = 32;

[[noreturn]] void fail(const std::string & why) {
    std::fprintf(stderr, "logits: %s\n", why.c_str());
    std::exit(1);
}

std::vector<Document> read_documents(const std::string & path, int32_t vocabulary) {
    std::ifstream in(path, std::ios::binary);
    if (!in) fail("cannot open " + path);
    std::vector<Document> documents;
    uint32_t count = 0;
    while (in.read(reinterpret_cast<char *>(&count), sizeof count)) {
        Document document;
        for (uint32_t i = 0; i < count; i++) {
            uint32_t id = 0;
            if (!in.read(reinterpret_cast<char *>(&id), sizeof id)) fail(path + " ends inside a document");
            if (id >= static_cast<uint32_t>(vocabulary)) fail(path + " has a token id beyond the vocabulary");
            document.push_back(static_cast<llama_token>(id));
        }
        if (!document.empty()) documents.push_back(std::move(document));
    }
    if (documents.empty()) fail(path + " holds no document");
    return documents;
}

llama_context * open_context(llama_model * model, size_t longest, int threads) {
    llama_context_params wanted = llama_context_default_params();
    const auto size = static_cast<uint32_t>(std::max(longest, SHORTEST_EXACT_BATCH));
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = size;
    wanted.n_seq_max = 1;
    wanted.n_threads = wanted.n_threads_batch = threads;
    wanted.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    wanted.type_k = wanted.type_v = GGML_TYPE_F32;
    // A sliding window must see the full-size cache, or positions that were evicted come back as noise.
    wanted.swa_full = true;
    llama_context * context = llama_init_from_model(model, wanted);
    if (!context) fail("llama.cpp gives no context");
    return context;
}

// Short documents are filled up with their last token: attention is causal, so the rows that are
// kept do not see the filling, and the batch is long enough for the exact product.
void decode(llama_context * context, llama_batch & batch, const Document & document) {
    llama_memory_clear(llama_get_memory(context), true);
    batch.n_tokens = static_cast<int32_t>(std::max(document.size(), SHORTEST_EXACT_BATCH));
    for (int32_t i = 0; i < batch.n_tokens; i++) {
        batch.token[i] = document[std::min<size_t>(i, document.size() - 1)];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    if (llama_decode(context, batch) != 0) fail("llama.cpp cannot decode a document");
}

void only_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

} // namespace

int main(int argc, char ** argv) {
    if (argc < 4) fail("usage: logits MODEL.gguf DOCUMENTS OUT.f32 [THREADS]");
    llama_log_set(only_errors, nullptr);
    llama_backend_init();

    llama_model_params how = llama_model_default_params();
    how.n_gpu_layers = 0;
    llama_model * model = llama_model_load_from_file(argv[1], how);
    if (!model) fail(std::string("llama.cpp cannot load ") + argv[1]);
    const int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));

    const std::vector<Document> documents = read_documents(argv[2], vocabulary);
    size_t longest = 0;
    for (const Document & document : documents) longest = std::max(longest, document.size());
    llama_context * context = open_context(model, longest, argc > 4 ? std::atoi(argv[4]) : 2);
    llama_batch batch = llama_batch_init(static_cast<int32_t>(std::max(longest, SHORTEST_EXACT_BATCH)), 0, 1);

    std::ofstream out(argv[3], std::ios::binary);
    for (const Document & document : documents) {
        decode(context, batch, document);
        const auto bytes = static_cast<std::streamsize>(document.size() * vocabulary * sizeof(float));
        out.write(reinterpret_cast<const char *>(llama_get_logits(context)), bytes);
    }
    out.flush();
    if (!out) fail(std::string("cannot write ") + argv[3]);

    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
