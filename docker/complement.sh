#!/bin/sh
# Starts the homeserver as Complement wants it: with the name $SERVER_NAME, a certificate for it by the authority in
# /complement/ca, which it trusts itself, and the application services in /complement/appservice. Complement may do that
# again in a copy of the container: name, certificate and application services are made anew, key and data stay.
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

# What was sent and not yet handled is kept on disk, or a restart would lose it. That is the first in_memory of two.
generate-config --ci --server "$SERVER_NAME" |
  sed -e "s|^  config_files: \[\]|  config_files: [${services#, }]|" -e '0,/in_memory: true/s//in_memory: false/' >dendrite.yaml

exec dendrite --really-enable-open-registration --config dendrite.yaml --tls-cert server.crt --tls-key server.key
