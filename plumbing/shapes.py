"""Published configurations of real models, for what is planned or measured without their weights.

Source: config.json of Qwen/Qwen2.5-VL-3B-Instruct, Qwen/Qwen2.5-VL-7B-Instruct and
Qwen/Qwen3-VL-2B-Instruct on the hub. Only what decides shapes is here; the rest are transformers'
defaults. tests/test_fit.py holds them to the published numbers of parameters.
"""

QWEN25_TOWER = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    patch_size=14,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)
ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0}
IDS = dict(image_token_id=151655, video_token_id=151656)
IDS |= dict(vision_start_token_id=151652, vision_end_token_id=151653)

SHAPES = {
    "qwen2.5-vl-3b": dict(
        model_type="qwen2_5_vl",
        tie_word_embeddings=True,
        text_config=dict(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151936,
            max_position_embeddings=128000,
            rope_parameters=ROPE,
            tie_word_embeddings=True,
        ),
        vision_config=QWEN25_TOWER | dict(out_hidden_size=2048),
        **IDS,
    ),
    "qwen2.5-vl-7b": dict(
        model_type="qwen2_5_vl",
        tie_word_embeddings=False,
        text_config=dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            max_position_embeddings=128000,
            rope_parameters=ROPE,
            tie_word_embeddings=False,
        ),
        vision_config=QWEN25_TOWER | dict(out_hidden_size=3584),
        **IDS,
    ),
    "qwen3-vl-2b": dict(
        model_type="qwen3_vl",
        tie_word_embeddings=True,
        text_config=dict(
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            max_position_embeddings=262144,
            rope_parameters={
                "rope_type": "default",
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
                "rope_theta": 5_000_000.0,
            },
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=24,
            hidden_size=1024,
            intermediate_size=4096,
            num_heads=16,
            patch_size=16,
            num_position_embeddings=2304,
            out_hidden_size=2048,
            deepstack_visual_indexes=[5, 11, 17],
        ),
        **IDS,
    ),
}
