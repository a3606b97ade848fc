# For who trains on GPUs; the machine needs Docker, NVIDIA's driver and its container toolkit.
#
#   docker build -t papo .
#   docker run --gpus all --ipc host -v papo-hub:/home/papo/.cache -v papo-out:/home/papo/papo/out \
#       papo --nproc_per_node 2 train.py --algo papo_g
#
# Not built or run yet. torch's wheels bring CUDA along, so no image of NVIDIA's is needed.
FROM python:3.12-slim

# Triton compiles a launcher when it first runs, so it needs a C compiler and its headers; a run
# writes down the commit that it is of, for which it asks git.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Named volumes take over the owner of the folder that they cover.
RUN useradd --create-home --uid 1000 papo && install -d -o papo -g papo /home/papo/.cache
WORKDIR /home/papo/papo
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY --chown=papo . .
RUN install -d -o papo -g papo out && chown papo .
USER 1000
ENTRYPOINT ["torchrun"]
CMD ["train.py", "--algo", "papo_g"]
