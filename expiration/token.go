package expiration

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
)

// tokenPurpose separates the tokens' key from other keys that are derived from the same secret. If it changes, a repeated request gets a
// token that the server does not know.
const tokenPurpose = "org.matrix.msc4140 expire_refresh_token"

// namesPurpose does the same for the key of the digests. If it changes, the next start is slow, because it reads whole rows.
const namesPurpose = "org.matrix.msc4140 digest 2"

// Tokens derives refresh tokens and delay IDs (docs/protocol.md, "Sending"). A token is a keyed hash of its event's ID, so a repeated
// request gets the same token although only the token's hash is stored. A token has 256 bits and is URL-safe. Without the key it reveals
// nothing and cannot be guessed.
//
// Tokens also makes the digests, under another key from the same secret.
type Tokens struct {
	key   []byte
	names names
}

// NewTokens derives the keys from a secret of the server.
func NewTokens(secret []byte) (t *Tokens, err error) {
	t = &Tokens{}
	for purpose, key := range map[string]*[]byte{tokenPurpose: &t.key, namesPurpose: &t.names.key} {
		if *key, err = hkdf.Key(sha256.New, secret, nil, purpose, sha256.Size); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// Digest returns the digest of a timer.
func (t *Tokens) Digest(row Timer) Digest { return t.names.digest(row) }

// Token returns the refresh token of an event.
func (t *Tokens) Token(eventID string) string {
	mac := hmac.New(sha256.New, t.key)
	mac.Write([]byte(eventID))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// HashToken returns the form in which a token is stored and looked up. Comparing hashes reveals nothing about how close a guess is.
func HashToken(token string) TokenHash {
	return sha256.Sum256([]byte(token))
}
