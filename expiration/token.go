package expiration

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
)

// tokenPurpose separates the key of the tokens from everything else that is made from the same secret. Changing it
// makes every retried request answer with a token that the server does not know.
const tokenPurpose = "org.matrix.msc4140 expire_refresh_token"

// namesPurpose does the same for the key of the digests. Changing it makes the next start a slow one, which reads whole rows.
const namesPurpose = "org.matrix.msc4140 digest"

// Tokens makes the refresh tokens (contract, section 1). A token is derived from the ID of its event under a secret key,
// so that a retried request gets the same one although only its hash is stored: 256 bits, URL-safe, and without the key
// nothing can be learnt from it or guessed about it.
//
// It makes the digests too, under another key from the same secret.
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

// HashToken returns the form in which a token is stored, indexed and looked up. Comparing hashes tells an attacker
// nothing about how near a guess was.
func HashToken(token string) TokenHash {
	return sha256.Sum256([]byte(token))
}
