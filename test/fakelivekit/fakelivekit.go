// Package fakelivekit is LiveKit's API for tests: rooms, participants, tokens and webhooks, without media. It is written after LiveKit's own answers, and
// does not use our client.
package fakelivekit

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// Key and Secret are those of every server.
const (
	Key    = "key-of-tests"
	Secret = "only-for-tests-only-for-tests-only-for-tests"
)

// Server is a LiveKit.
type Server struct {
	// URL is where its API is.
	URL  string
	http *httptest.Server

	mu    sync.Mutex // guards the fields below
	away  bool
	rooms map[string]room // by name
}

// room is a room, with the fields that our server looks at.
type room struct {
	SID          string `json:"sid"`
	Name         string `json:"name"`
	CreationTime string `json:"creation_time"` // protobuf's JSON has 64-bit numbers as strings

	participants map[string]participant // by identity
}

// participant is a session, with the fields that our server looks at.
type participant struct {
	SID      string `json:"sid"`
	Identity string `json:"identity"`
	State    string `json:"state"`
}

// Start starts a server, which the caller must close.
func Start() *Server {
	s := &Server{rooms: map[string]room{}}
	s.http = httptest.NewServer(http.HandlerFunc(s.serve))
	s.URL = s.http.URL
	return s
}

// Close stops the server.
func (s *Server) Close() { s.http.Close() }

// Section is the section matrix_rtc.livekit of a homeserver that uses this server. Its URL for clients is url.
func (s *Server) Section(url string) map[string]any {
	return map[string]any{"url": url, "api_url": s.URL, "api_key": Key, "api_secret": Secret}
}

// SetAway makes the server answer as a proxy does whose LiveKit is down, until it is called again.
func (s *Server) SetAway(away bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = away
}

// Rooms returns the names of all rooms.
func (s *Server) Rooms() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.rooms))
}

// Forget forgets all rooms, as a restart does.
func (s *Server) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.rooms)
}

// Enter connects a participant with a token of ours, as a client does. As in LiveKit, the room must be there, and an older session of the
// same identity ends.
func (s *Server) Enter(token string) error {
	claims, err := Verify(token)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.rooms[claims.Video.Room]
	if !ok || !claims.Video.RoomJoin {
		return errors.New("there is no such room, or the token is not for it")
	}
	r.participants[claims.Subject] = participant{SID: newSID("PA"), Identity: claims.Subject, State: "ACTIVE"}
	return nil
}

// Leave ends the session of a participant. It reports nothing to the homeserver.
func (s *Server) Leave(room, identity string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.rooms[room].participants, identity)
}

// Has reports whether a participant is connected.
func (s *Server) Has(room, identity string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.rooms[room].participants[identity]
	return ok
}

// newSID returns an ID that no other room or session has.
func newSID(kind string) string { return kind + "_" + rand.Text() }

// Claims are the claims of a token.
type Claims struct {
	jwt.RegisteredClaims
	Video struct {
		Room           string `json:"room"`
		RoomJoin       bool   `json:"roomJoin"`
		RoomCreate     bool   `json:"roomCreate"`
		RoomList       bool   `json:"roomList"`
		RoomAdmin      bool   `json:"roomAdmin"`
		CanPublish     *bool  `json:"canPublish"`
		CanPublishData *bool  `json:"canPublishData"`
		CanSubscribe   *bool  `json:"canSubscribe"`
	} `json:"video"`
	SHA256 string `json:"sha256,omitempty"`
}

// Verify returns the claims of a token that is ours and valid now.
func Verify(token string) (claims Claims, err error) {
	_, err = jwt.NewParser(jwt.WithValidMethods([]string{"HS256"}), jwt.WithIssuer(Key), jwt.WithExpirationRequired()).
		ParseWithClaims(token, &claims, func(*jwt.Token) (any, error) { return []byte(Secret), nil })
	return claims, err
}

// Report sends a signed webhook to a homeserver, and returns the status of the answer.
func Report(ctx context.Context, url string, event map[string]any) (int, error) {
	body, err := json.Marshal(event)
	if err != nil {
		return 0, err
	}
	sum := sha256.Sum256(body)
	now := time.Now()
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, Claims{
		RegisteredClaims: jwt.RegisteredClaims{
			Issuer: Key, NotBefore: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(5 * time.Minute)),
		},
		SHA256: base64.StdEncoding.EncodeToString(sum[:]),
	}).SignedString([]byte(Secret))
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", token)
	req.Header.Set("Content-Type", "application/webhook+json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	return res.StatusCode, res.Body.Close()
}

// serve answers a client, or a call in Twirp's JSON.
func (s *Server) serve(w http.ResponseWriter, req *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away {
		http.Error(w, "<html>Bad Gateway", http.StatusBadGateway)
		return
	}
	if !strings.HasPrefix(req.URL.Path, "/twirp/") {
		status, text := s.admit(req)
		w.Header().Set("Access-Control-Allow-Origin", "*")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, text)
		return
	}
	status, answer := s.call(req)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(answer)
}

// admit answers a client with a token in the query, as LiveKit does with room.auto_create: false. There are no WebSockets, so a client can
// only ask whether it would be let in. The mutex is held.
func (s *Server) admit(req *http.Request) (status int, text string) {
	token := req.FormValue("access_token")
	claims, err := Verify(token)
	_, roomThere := s.rooms[claims.Video.Room]
	isWebSocket := req.URL.Path == "/rtc" && strings.EqualFold(req.Header.Get("Upgrade"), "websocket")
	switch {
	case token != "" && err != nil:
		return http.StatusUnauthorized, "invalid token: " + token + ", error: " + err.Error()
	case req.URL.Path != "/rtc/validate" && !isWebSocket:
		return http.StatusNotFound, "404 page not found"
	case !claims.Video.RoomJoin:
		return http.StatusUnauthorized, "permissions denied"
	case !roomThere:
		return http.StatusNotFound, "requested room does not exist"
	case isWebSocket:
		return http.StatusNotImplemented, "this LiveKit has no WebSockets"
	}
	return http.StatusOK, "success"
}

// call answers a call. The mutex is held.
func (s *Server) call(req *http.Request) (status int, answer any) {
	var body struct {
		Name     string   `json:"name"`
		Names    []string `json:"names"`
		Room     string   `json:"room"`
		Identity string   `json:"identity"`
	}
	token, isBearer := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
	claims, err := Verify(token)
	if !isBearer {
		err = errors.New("no token")
	}
	switch {
	case err != nil:
		return http.StatusUnauthorized, failure("unauthenticated", err.Error())
	case json.NewDecoder(req.Body).Decode(&body) != nil:
		return http.StatusBadRequest, failure("malformed", "the json request could not be decoded")
	}
	method := strings.TrimPrefix(req.URL.Path, "/twirp/livekit.RoomService/")
	switch {
	case method == "CreateRoom" && claims.Video.RoomCreate:
		made, ok := s.rooms[body.Name]
		if !ok {
			now := time.Now()
			made = room{newSID("RM"), body.Name, fmt.Sprint(now.Unix()), map[string]participant{}}
			s.rooms[body.Name] = made
		}
		return http.StatusOK, made
	case method == "ListRooms" && claims.Video.RoomList:
		found := []room{}
		for name, r := range s.rooms {
			if len(body.Names) == 0 || slices.Contains(body.Names, name) {
				found = append(found, r)
			}
		}
		return http.StatusOK, map[string]any{"rooms": found}
	case method == "CreateRoom", method == "ListRooms", !claims.Video.RoomAdmin || claims.Video.Room != body.Room:
		return http.StatusUnauthorized, failure("unauthenticated", "permissions denied")
	}
	participants := s.rooms[body.Room].participants
	found, ok := participants[body.Identity]
	switch {
	case method == "ListParticipants":
		return http.StatusOK, map[string]any{"participants": slices.AppendSeq([]participant{}, maps.Values(participants))}
	case (method == "GetParticipant" || method == "RemoveParticipant") && !ok:
		return http.StatusNotFound, failure("not_found", "participant does not exist")
	case method == "GetParticipant":
		return http.StatusOK, found
	case method == "RemoveParticipant":
		delete(participants, body.Identity)
		return http.StatusOK, struct{}{}
	}
	return http.StatusNotFound, failure("bad_route", "no handler for path "+req.URL.Path)
}

func failure(code, msg string) map[string]string { return map[string]string{"code": code, "msg": msg} }
