#!/bin/sh
# Starts the homeserver as Complement expects: its name is $SERVER_NAME, the authority in /complement/ca signs its certificate,
# and the application services are those in /complement/appservice. The homeserver trusts the same authority. Complement may
# start a copy of the container. Then name, certificate and application services are written again, but key and data stay.
set -eu

ca=/complement/ca
export SSL_CERT_FILE=$ca/ca.crt

[ -e matrix_key.pem ] || generate-keys --private-key matrix_key.pem
generate-keys --server "$SERVER_NAME" --keysize 2048 --tls-cert server.crt --tls-key server.key \
  --tls-authority-cert $ca/ca.crt --tls-authority-key $ca/ca.key

services=
for file in /complement/appservice/*.yaml; do
  [ ! -e "$file" ] || services="$services, '$file'"
done

# The streams are on disk, so that a restart does not lose queued messages. The first of the two in_memory settings is that of the streams.
generate-config --ci --server "$SERVER_NAME" |
  sed -e "s|^  config_files: \[\]|  config_files: [${services#, }]|" -e '0,/in_memory: true/s//in_memory: false/' >dendrite.yaml

exec dendrite --really-enable-open-registration --config dendrite.yaml --tls-cert server.crt --tls-key server.key
