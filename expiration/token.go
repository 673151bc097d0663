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

// Tokens makes the refresh tokens (contract, section 1). A token is derived from the ID of its event under a secret key,
// so that a retried request gets the same one although only its hash is stored: 256 bits, URL-safe, and without the key
// nothing can be learnt from it or guessed about it.
type Tokens struct {
	key []byte
}

// NewTokens derives the key for the tokens from a secret of the server.
func NewTokens(secret []byte) (*Tokens, error) {
	key, err := hkdf.Key(sha256.New, secret, nil, tokenPurpose, sha256.Size)
	if err != nil {
		return nil, err
	}
	return &Tokens{key: key}, nil
}

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
