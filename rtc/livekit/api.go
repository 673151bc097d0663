// Package livekit is LiveKit from outside: its names for rooms and participants, tokens for it, its API and its webhooks (MSC4195).
//
// What it guarantees:
//
//   - ErrNotFound comes only from LiveKit's API itself. A failure on the way there, or a proxy's own 404, is another error.
//   - An event of Hear was signed with our key, over exactly this body, at most a few minutes ago.
//   - No error and no printed value contains the secret or a token.
//   - Each request ends within five seconds, and reads a bounded answer.
//
// LiveKit's own module github.com/livekit/protocol does the same, and would bring some 45 modules into the homeserver. So this package signs
// with github.com/golang-jwt/jwt, as LiveKit does, and calls the API as JSON over HTTP. The tests in test/livekit try it on the real LiveKit.
package livekit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

var (
	// ErrNotFound means that LiveKit does not have the room or the participant.
	ErrNotFound = errors.New("not there")
	// ErrRefused means that LiveKit does not accept our tokens: the key or the secret is wrong, or a clock is more than a minute off.
	ErrRefused = errors.New("our token is refused")
)

const (
	// callTimeout is the most that a call takes. LiveKit answers from its memory.
	callTimeout = 5 * time.Second
	// maxAnswer bounds an answer, in bytes. A participant who publishes is a few kilobytes.
	maxAnswer = 16 << 20

	// emptyTimeout is for how many seconds LiveKit keeps a room to which nobody comes (MSC4195).
	emptyTimeout = 300
	// departureTimeout is for how many seconds LiveKit keeps a room that everybody has left (MSC4195).
	departureTimeout = 20
)

// Config says where LiveKit's API is, and which key LiveKit knows us by.
type Config struct {
	// APIURL begins with http: or https:. It is LiveKit's URL for clients, or another one that leads to the same server.
	APIURL string
	Key    string
	Secret Secret
}

// Client makes tokens for one LiveKit, calls its API and verifies its webhooks. All its methods may be called at the same time.
type Client struct {
	apiURL, key string
	secret      func() []byte // a function, because fmt prints unexported fields without asking Secret
	http        http.Client
	webhooks    *jwt.Parser
}

// New returns a client. It sends nothing.
func New(cfg Config) *Client {
	return &Client{
		apiURL: strings.TrimRight(cfg.APIURL, "/"), key: cfg.Key, secret: func() []byte { return []byte(cfg.Secret) },
		// LiveKit never redirects, and a token is for nobody else.
		http:     http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
		webhooks: webhookParser(cfg.Key),
	}
}

// Room is a room at LiveKit.
type Room struct {
	// SID is the ID of this very room. A room that is made again under the same name has another one.
	SID  string `json:"sid"`
	Name string `json:"name"`
}

// Session is one stay of a participant in a room.
type Session struct {
	// SID is the ID of this very stay. A participant who comes back has another one.
	SID      string `json:"sid"`
	Identity string `json:"identity"`
	State    State  `json:"state"`
}

// State is how far a session is.
type State string

// The states of a session.
const (
	Joining      State = "JOINING" // the client has connected
	Joined       State = "JOINED"  // the client has sent its offer
	Active       State = "ACTIVE"  // media can flow
	Disconnected State = "DISCONNECTED"
)

// CreateRoom makes a room, or returns the one that is there.
func (c *Client) CreateRoom(ctx context.Context, name string) (room Room, err error) {
	_, err = c.call(ctx, "CreateRoom", adminGrant{RoomCreate: true}, map[string]any{
		"name": name, "empty_timeout": emptyTimeout, "departure_timeout": departureTimeout, "max_participants": 0,
	}, &room, func() bool { return room.Name == name && room.SID != "" })
	return room, err
}

// Room returns a room. The error is ErrNotFound if it is not there.
func (c *Client) Room(ctx context.Context, name string) (Room, error) {
	rooms, _, err := c.listRooms(ctx, name)
	switch {
	case err != nil:
		return Room{}, err
	case len(rooms) == 0:
		return Room{}, fmt.Errorf("looking for a room at LiveKit: %w", ErrNotFound)
	}
	return rooms[0], nil
}

// Check calls LiveKit once, to find out whether it is there and accepts our key. The skew is how far its clock is ahead of ours, and
// negative if LiveKit's is behind. An answer's Date header has seconds only, so a skew below that is zero, as is one that is not known.
// It comes along with ErrRefused too, which it may explain. A reverse proxy before LiveKit may put its own clock there.
func (c *Client) Check(ctx context.Context) (skew time.Duration, err error) {
	sent := time.Now()
	_, header, err := c.listRooms(ctx, "-") // no room has this name, because names are hashes
	if date, missing := http.ParseTime(header.Get("Date")); missing == nil {
		skew = skewOf(date, sent, time.Now())
	}
	return skew, err
}

// skewOf returns by how much, at least, the clock is ahead that showed a date between two times of ours.
func skewOf(date, sent, received time.Time) time.Duration {
	if date.After(received) {
		return date.Sub(received)
	}
	return min(0, date.Add(time.Second).Sub(sent))
}

// listRooms returns the room of a name, if it is there, and the header of the answer.
func (c *Client) listRooms(ctx context.Context, name string) ([]Room, http.Header, error) {
	var answer struct {
		Rooms []Room `json:"rooms"`
	}
	header, err := c.call(ctx, "ListRooms", adminGrant{RoomList: true}, map[string]any{"names": []string{name}}, &answer, func() bool {
		return answer.Rooms != nil && (len(answer.Rooms) == 0 || answer.Rooms[0].Name == name)
	})
	return answer.Rooms, header, err
}

// Participants returns all sessions in a room. There are none if the room is not there.
func (c *Client) Participants(ctx context.Context, room string) ([]Session, error) {
	var answer struct {
		Participants []Session `json:"participants"`
	}
	_, err := c.call(ctx, "ListParticipants", adminGrant{Room: room, RoomAdmin: true}, map[string]any{"room": room}, &answer,
		func() bool { return answer.Participants != nil })
	return answer.Participants, err
}

// Participant returns the session of a participant. The error is ErrNotFound if there is none, or no such room.
func (c *Client) Participant(ctx context.Context, p Participant) (session Session, err error) {
	_, err = c.call(ctx, "GetParticipant", adminGrant{Room: p.Room, RoomAdmin: true}, p, &session,
		func() bool { return session.Identity == p.Identity })
	return session, err
}

// Remove ends the session of a participant. The error is ErrNotFound if there is none. The participant can connect again while its token is
// valid.
func (c *Client) Remove(ctx context.Context, p Participant) error {
	_, err := c.call(ctx, "RemoveParticipant", adminGrant{Room: p.Room, RoomAdmin: true}, p, &struct{}{}, func() bool { return true })
	return err
}

// call calls a method of LiveKit's RoomService, with a token for this call alone. The protocol is Twirp's, with JSON. The answer is decoded,
// and then checked by isLiveKit. The returned header is that of the answer, if one came.
func (c *Client) call(ctx context.Context, method string, grant adminGrant, request, answer any, isLiveKit func() bool) (http.Header, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	token, err := c.sign("", adminValidity, grant)
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(request)
	if err != nil {
		return nil, fmt.Errorf("encoding a request to LiveKit: %w", err)
	}
	url := c.apiURL + "/twirp/livekit.RoomService/" + method
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("making a request to LiveKit: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	res, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("calling LiveKit: %w", err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer)) // the part of a longer answer is no JSON
	switch {
	case err != nil:
		err = fmt.Errorf("reading LiveKit's answer to %s: %w", method, err)
	case res.StatusCode != http.StatusOK:
		err = failure(method, res.StatusCode, text)
	case json.Unmarshal(text, answer) != nil || !isLiveKit():
		err = fmt.Errorf("the answer to %s is not LiveKit's", method)
	}
	return res.Header, err
}

// failure returns the error for an answer without success. The error has nothing of the answer's text, because LiveKit repeats a token that
// it refuses.
func failure(method string, status int, text []byte) error {
	var twirp struct {
		Code string `json:"code"`
	}
	err := json.Unmarshal(text, &twirp)
	switch {
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return fmt.Errorf("LiveKit's %s: %w", method, ErrRefused)
	case err != nil || twirp.Code == "": // every failure of the API itself has a code
		return fmt.Errorf("the answer to %s is not LiveKit's: HTTP %d", method, status)
	case twirp.Code == "not_found":
		return fmt.Errorf("LiveKit's %s: %w", method, ErrNotFound)
	}
	return fmt.Errorf("LiveKit's %s: HTTP %d", method, status)
}
