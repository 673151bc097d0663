package livekit

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	// clockLeeway is how far LiveKit's clock may be off. It is LiveKit's own leeway for our tokens.
	clockLeeway = time.Minute
	// maxAuthorization bounds a webhook's token, in bytes. Strangers can send a longer one. LiveKit's has about 300.
	maxAuthorization = 4 << 10
)

// Kind is what an event is about. LiveKit has more kinds than these.
type Kind string

// The kinds that tell who is connected.
const (
	ParticipantJoined Kind = "participant_joined" // the session is active
	ParticipantLeft   Kind = "participant_left"
	// ParticipantAborted comes in place of ParticipantLeft if the session has never been active.
	ParticipantAborted Kind = "participant_connection_aborted"
	// RoomFinished comes when a room is closed. Nobody is in it any more.
	RoomFinished Kind = "room_finished"
)

// Reason is why LiveKit has ended a session. LiveKit has more reasons than these.
type Reason string

// The reasons that do not tell that a participant has left.
const (
	ServerShutdown Reason = "SERVER_SHUTDOWN" // LiveKit stops
	StateMismatch  Reason = "STATE_MISMATCH"  // the client is told to connect anew
	Migration      Reason = "MIGRATION"       // the client is sent to another node
	SignalClose    Reason = "SIGNAL_CLOSE"    // the WebSocket broke before the session was active
)

// Event is what LiveKit reports. It may come late, twice, in another order, or not at all.
type Event struct {
	Kind Kind
	// Participant has no Identity if the event is about a room.
	Participant
	// SID is the ID of the participant's session. RoomSID is the ID of the room.
	SID, RoomSID string
	// Reason is empty unless a session has ended.
	Reason Reason
	// Created is when LiveKit made the event, by LiveKit's clock, to a second.
	Created time.Time
}

// webhookClaims are the claims of a webhook's token.
type webhookClaims struct {
	jwt.RegisteredClaims
	// SHA256 is the padded base64 of the body's SHA-256.
	SHA256 string `json:"sha256"`
}

// webhookParser returns the parser of webhooks' tokens. It accepts only what LiveKit makes: our key, one algorithm, a limited validity.
func webhookParser(key string) *jwt.Parser {
	return jwt.NewParser(jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Alg()}), jwt.WithIssuer(key),
		jwt.WithExpirationRequired(), jwt.WithNotBeforeRequired(), jwt.WithLeeway(clockLeeway))
}

// Hear verifies a webhook of LiveKit, and returns its event. The authorization is the value of the Authorization header, which is a token
// without "Bearer". The body must be as it came, byte by byte; the caller bounds it. LiveKit lists a participant's tracks in it, so a
// megabyte is not too much.
//
// An error means that the webhook is not LiveKit's, or that its key is not ours. It says why, and has nothing of a token.
func (c *Client) Hear(authorization string, body []byte) (Event, error) {
	if len(authorization) > maxAuthorization {
		return Event{}, errors.New("verifying a webhook: the token is too long")
	}
	var claims webhookClaims
	_, err := c.webhooks.ParseWithClaims(authorization, &claims, func(*jwt.Token) (any, error) { return c.secret(), nil })
	if errors.Is(err, jwt.ErrTokenMalformed) {
		err = jwt.ErrTokenMalformed // without the details, which may quote the token
	}
	if err != nil {
		return Event{}, fmt.Errorf("verifying a webhook: %w", err)
	}
	sum := sha256.Sum256(body)
	if subtle.ConstantTimeCompare([]byte(claims.SHA256), []byte(base64.StdEncoding.EncodeToString(sum[:]))) != 1 {
		return Event{}, errors.New("verifying a webhook: the token is for another body")
	}
	// This is protobuf's JSON: 64-bit numbers are strings, and what has its default value is left out.
	var event struct {
		Kind Kind `json:"event"`
		Room Room `json:"room"`
		By   struct {
			SID      string `json:"sid"`
			Identity string `json:"identity"`
			Reason   Reason `json:"disconnectReason"`
		} `json:"participant"`
		CreatedAt json.Number `json:"createdAt"` // seconds
	}
	if err = json.Unmarshal(body, &event); err != nil {
		return Event{}, fmt.Errorf("reading a webhook: %w", err)
	}
	seconds, _ := event.CreatedAt.Int64() // zero if it is missing
	return Event{
		Kind: event.Kind, Participant: Participant{Room: event.Room.Name, Identity: event.By.Identity},
		SID: event.By.SID, RoomSID: event.Room.SID, Reason: event.By.Reason, Created: time.Unix(seconds, 0),
	}, nil
}
