# The image of deploy/kubernetes: the versions of constraints.txt and this checkout; CUDA comes with torch's wheels, the driver from the node.
#     docker build -t your-registry/clipq_ray:0.1.0 . && docker push your-registry/clipq_ray:0.1.0
FROM python:3.11-slim-bookworm

# what KubeRay's probes and `ray` itself call, and a C compiler: Triton compiles the operator's kernels on the node
RUN apt-get update && apt-get install -y --no-install-recommends wget procps gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray

WORKDIR /home/ray/clipq_ray
# the environment first: it changes less often than the code
COPY --chown=ray pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ray clipq_ray/__init__.py clipq_ray/__init__.py
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[cluster,s3,report]'
COPY --chown=ray clipq_ray clipq_ray
COPY --chown=ray jobs jobs
COPY --chown=ray recipes recipes

USER ray
# jobs find `jobs/compress.py` where Ray starts; workers import the checkout from anywhere
ENV PYTHONPATH=/home/ray/clipq_ray RAY_USAGE_STATS_ENABLED=0
CMD ["python", "jobs/compress.py", "--help"]
