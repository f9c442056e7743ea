"""The SQL of a cache's views: text only, no database.

chains      one row a chain, readable columns, with its latest verdict
prompts     one row a prompt: samples, pass rate, mean length
tokens      one row a completion token: piece, log probability, rank, entropy, top-1 probability, tail mass, part
topk        one row a stored candidate: rank, piece, probability
verdicts    the latest verdict of each judge; failures, runs, vocab as stored
chain_rows  chains, with the file, row group and row where each lies (for the trainer)

`tokens.top1_prob`, `tokens.tail_mass` and `topk.prob` come from the stored codes as they are: the decoder of
shared.codec also divides by their sum, which differs from one by no more than the codes' own rounding.
"""

from collections.abc import Mapping, Sequence

from shared.codec import LOGPROB_RANGE_NATS, MAX_CODE

VIEWS = ("chains", "prompts", "tokens", "topk", "verdicts", "failures", "runs", "vocab")
"""What a user sees, in the order they are explained."""


def quote(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def view_statements(files: Mapping[str, Sequence[str]]) -> list[str]:
    """CREATE VIEW statements in order; `files` names the Parquet files of chains, verdicts, failures and vocab."""
    chains = _scan(files["chains"], ", file_row_number = true")
    code_prob = f"exp(-{LOGPROB_RANGE_NATS} * pow(CAST({{}} AS DOUBLE) / {MAX_CODE}, 2))"
    topk_prob = f"coalesce({code_prob.format('topk_codes')}, exp(topk_logprobs))"
    top1_prob = f"coalesce({code_prob.format('top1_code')}, exp(top1_logprob))"
    tail_mass = f"coalesce(if(tail_code = {MAX_CODE}, 0, {code_prob.format('tail_code')}), exp(tail_logmass))"
    metadata = f"parquet_metadata([{', '.join(quote(path) for path in files['chains'])}])"
    return [
        f"CREATE VIEW shards AS SELECT * FROM {chains}",
        f"CREATE VIEW failures AS SELECT * EXCLUDE (filename) FROM {_scan(files['failures'])}",
        rf"""CREATE VIEW vocab AS SELECT token_id, piece, is_special,
             regexp_extract(filename, '([^/\\]+)\.parquet$', 1) AS tokenizer FROM {_scan(files["vocab"])}""",
        f"""CREATE VIEW verdicts AS SELECT sample_id, judge, max(judged_at) AS judged_at,
             arg_max_null(correct, judged_at) AS correct, arg_max_null(score, judged_at) AS score
           FROM {_scan(files["verdicts"])} GROUP BY sample_id, judge""",
        """CREATE VIEW latest_verdicts AS SELECT sample_id, arg_max_null(judge, judged_at) AS judge,
             arg_max_null(correct, judged_at) AS correct, arg_max_null(score, judged_at) AS score
           FROM verdicts GROUP BY sample_id""",
        """CREATE VIEW chains AS SELECT s.sample_id, s.chain_id, s.prompt_id, s.sample_index, s.run_id, s.source,
        s.split,
             list_filter(s.messages, lambda m: m.role = 'user')[-1].content AS prompt, s.reference,
             s.text, s.reasoning, s.answer, v.correct, v.score, v.judge, s.finish_reason,
             s.finish_reason = 'length' AS truncated, s.num_prompt_tokens, s.num_tokens, s.num_reasoning_tokens,
             s.reasoning_end, s.mean_logprob, s.mean_entropy, s.mean_top1_prob, s.mean_tail_mass, s.mean_support,
             s.seed, s.worker, s.created_at, s.metadata
           FROM shards s LEFT JOIN latest_verdicts v USING (sample_id)""",
        f"""CREATE VIEW row_groups AS SELECT file_name, row_group_id,
             sum(num_rows) OVER (PARTITION BY file_name ORDER BY row_group_id) - num_rows AS first_row
           FROM (SELECT DISTINCT file_name, row_group_id, row_group_num_rows AS num_rows FROM {metadata})""",
        r"""CREATE VIEW chain_rows AS SELECT c.*, regexp_extract(p.filename, '([^/\\]+[/\\][^/\\]+)$', 1) AS file,
             g.row_group_id::INTEGER AS row_group, (p.file_row_number - g.first_row)::INTEGER AS row_in_group
           FROM chains c JOIN (SELECT sample_id, filename, file_row_number FROM shards) p USING (sample_id)
           ASOF JOIN row_groups g ON p.filename = g.file_name AND p.file_row_number >= g.first_row""",
        """CREATE VIEW prompts AS SELECT prompt_id, any_value(source) AS source, any_value(split) AS split,
             any_value(prompt) AS prompt, any_value(reference) AS reference, count(*) AS num_samples,
             count(correct) AS num_judged, count(*) FILTER (correct) AS num_correct,
             avg(correct::INTEGER) AS pass_rate, avg(num_tokens) AS mean_num_tokens,
             count(*) FILTER (truncated) AS num_truncated
           FROM chains GROUP BY prompt_id""",
        f"""CREATE VIEW tokens AS SELECT t.sample_id, t.source, t.position, t.token_id, v.piece, t.logprob, t.rank,
             t.entropy, {top1_prob} AS top1_prob, {tail_mass} AS tail_mass, t.support,
             CASE WHEN t.reasoning_end IS NULL OR t.position < t.reasoning_end THEN 'reasoning' ELSE 'answer' END AS
             part
           FROM (SELECT sample_id, source, run_id, reasoning_end, unnest(range(len(token_ids))) AS position,
               unnest(token_ids) AS token_id, unnest(sampled_logprob) AS logprob, unnest(sampled_rank) AS rank,
               unnest(entropy) AS entropy, unnest(topk_n) AS support, unnest(tail_codes) AS tail_code,
               unnest(tail_logmass) AS tail_logmass, unnest(list_where(topk_codes, is_first)) AS top1_code,
               unnest(list_where(topk_logprobs, is_first)) AS top1_logprob
             FROM (SELECT *, flatten(list_transform(topk_n, lambda n: list_resize([true], n, false))) AS is_first
                   FROM shards)) t
           LEFT JOIN runs r USING (run_id)
           LEFT JOIN vocab v ON v.tokenizer = r.tokenizer AND v.token_id = t.token_id""",
        f"""CREATE VIEW topk AS SELECT t.sample_id, t.position, t.rank, t.token_id, v.piece, {topk_prob} AS prob
           FROM (SELECT sample_id, run_id,
               unnest(flatten(list_transform(topk_n, lambda n, i: list_resize([i - 1], n, i - 1)))) AS position,
               unnest(flatten(list_transform(topk_n, lambda n: range(1, n + 1)))) AS rank,
               unnest(topk_ids) AS token_id, unnest(topk_codes) AS topk_codes, unnest(topk_logprobs) AS topk_logprobs
             FROM shards) t
           LEFT JOIN runs r USING (run_id)
           LEFT JOIN vocab v ON v.tokenizer = r.tokenizer AND v.token_id = t.token_id""",
    ]


def _scan(files: Sequence[str], options: str = "") -> str:
    listed = ", ".join(quote(path) for path in files)
    return f"read_parquet([{listed}], union_by_name = true, filename = true{options})"
