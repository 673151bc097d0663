package livekit

import (
	"fmt"
	"io"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	// TokenValidity is how long a client can connect with a token. A token cannot be revoked, so this is short (MSC4195). A client that is
	// connected stays so, because LiveKit renews its token.
	TokenValidity = 10 * time.Minute
	// adminValidity is how long a token for one request to LiveKit's API is valid.
	adminValidity = time.Minute
)

// Secret is the secret of an API key. It has a type of its own so that no log and no error can show it.
type Secret string

const hidden = "…"

// Format prints the secret as dots, whatever the verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, hidden) }

// MarshalText encodes the secret as dots, for logs in JSON.
func (Secret) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// Participant is a member of a slot at LiveKit. Both names are LiveKit's own: see RoomName and Identity.
type Participant struct {
	Room     string `json:"room"`
	Identity string `json:"identity"`
}

// Grant says what a client may do at LiveKit: connect as this participant, subscribe, and, if Publish is set, publish media and data.
type Grant struct {
	Participant
	Publish bool
}

// claims are the claims of a token. LiveKit reads them from the same names.
type claims struct {
	jwt.RegisteredClaims
	// Video is a participantGrant or an adminGrant.
	Video any `json:"video"`
}

// participantGrant has each claim in the token, because LiveKit takes a missing canPublish, canPublishData or canSubscribe for true.
type participantGrant struct {
	Room                 string `json:"room"`
	RoomJoin             bool   `json:"roomJoin"`
	CanSubscribe         bool   `json:"canSubscribe"`
	CanPublish           bool   `json:"canPublish"`
	CanPublishData       bool   `json:"canPublishData"`
	CanUpdateOwnMetadata bool   `json:"canUpdateOwnMetadata"`
}

// adminGrant is what a request to LiveKit's API needs. No client ever gets such a token.
type adminGrant struct {
	// Room is the room of RoomAdmin.
	Room       string `json:"room,omitempty"`
	RoomAdmin  bool   `json:"roomAdmin,omitempty"`
	RoomCreate bool   `json:"roomCreate,omitempty"`
	RoomList   bool   `json:"roomList,omitempty"`
}

// Token returns the token with which a client connects to LiveKit. Its claims are those of MSC4195. It is valid from now on for
// TokenValidity.
func (c *Client) Token(g Grant) (string, error) {
	return c.sign(g.Identity, TokenValidity, participantGrant{
		Room: g.Room, RoomJoin: true, CanSubscribe: true, CanPublish: g.Publish, CanPublishData: g.Publish,
	})
}

// sign returns a token with our key. The identity is empty in tokens for LiveKit's API.
func (c *Client) sign(identity string, validity time.Duration, video any) (string, error) {
	now := time.Now()
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims{
		RegisteredClaims: jwt.RegisteredClaims{
			Issuer: c.key, Subject: identity,
			NotBefore: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(validity)),
		},
		Video: video,
	}).SignedString(c.secret())
	if err != nil {
		return "", fmt.Errorf("signing a token for LiveKit: %w", err)
	}
	return token, nil
}
