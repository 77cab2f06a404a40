"""Reads from S3 and compatible stores (`s3://bucket/key`), through the http reader.

Credentials, region and endpoint are found as the AWS tools find them: environment (AWS_ACCESS_KEY_ID, AWS_PROFILE,
AWS_ENDPOINT_URL, AWS_REGION, ...), ~/.aws, the role of the machine; without any, access is anonymous. boto3 signs
addresses and lists buckets; the bytes come by data.storage.web.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import urllib3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, CredentialRetrievalError, HTTPClientError

from data.errors import DataError
from data.storage.web import TRANSIENT, Web

EXPIRES = 3600  # seconds that a signed address lasts; each request has a fresh one


class S3(Web):
    """Objects of buckets; see Web."""

    def __init__(self, timeout: float):
        super().__init__(timeout)
        self._region: str | None = None  # where the bucket was found to lie
        self._client: Any = None
        self._client_pid = 0
        self.certificates = os.environ.get("AWS_CA_BUNDLE")

    def address(self, url: str) -> str:
        """A signed address, or a plain one where there are no credentials."""
        bucket, key = split(url)
        if not key:
            raise DataError(f"{url} names no object; expected s3://bucket/key")
        with _as_our_errors(url):
            values = {"Bucket": bucket, "Key": key}
            text: str = self._boto().generate_presigned_url("get_object", Params=values, ExpiresIn=EXPIRES)
            return text

    def moved(self, response: urllib3.BaseHTTPResponse) -> bool:
        """The bucket lies in another region than the one that the address was signed for."""
        region = response.headers.get("x-amz-bucket-region")
        if response.status not in (301, 307, 400) or not region or region == self._region:
            return False
        self._region, self._client = region, None
        return True

    def files_below(self, url: str) -> Iterator[tuple[str, int]]:
        """(name below the folder `url`, bytes) of every object, in the order of their keys."""
        bucket, prefix = split(url)
        prefix = f"{prefix.rstrip('/')}/" if prefix else ""
        with _as_our_errors(url):
            for page in self._boto().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for entry in page.get("Contents", ()):
                    if name := entry["Key"][len(prefix) :]:  # the folder itself may be an object
                        yield name, entry["Size"]

    def _boto(self) -> Any:
        client = self._client
        if client is None or self._client_pid != os.getpid():
            session = boto3.Session()
            signed = session.get_credentials() is not None
            config = Config(
                signature_version="s3v4" if signed else UNSIGNED,
                connect_timeout=self.timeout,
                read_timeout=self.timeout,
                retries={"mode": "standard", "max_attempts": 3},
            )
            region = self._region or session.region_name or "us-east-1"
            client = session.client("s3", region_name=region, config=config)
            self._client, self._client_pid = client, os.getpid()
        return client


def split(url: str) -> tuple[str, str]:
    """Bucket and key of s3://bucket/key."""
    bucket, _, key = url.partition("://")[2].partition("/")
    if not bucket:
        raise DataError(f"{url} names no bucket; expected s3://bucket/key")
    return bucket, key


@contextmanager
def _as_our_errors(url: str) -> Iterator[None]:
    """OSError for what may pass, DataError for what won't."""
    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "unknown")
        if status >= 500 or status in TRANSIENT:
            raise OSError(f"the store answers {status} ({code})") from error
        raise DataError(f"{url}: the store answers {status} ({code}); check the address and your access") from error
    except (HTTPClientError, CredentialRetrievalError) as error:  # no connection, no answer
        raise OSError(str(error)) from error
    except (BotoCoreError, ValueError) as error:  # a profile, a region, an endpoint that is none
        raise DataError(f"{url} can't be read ({error}); check the settings of AWS (AWS_PROFILE, ~/.aws)") from error
