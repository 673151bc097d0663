// Command authservice replaces lk-jwt-service, which is not on the module proxy. It gives a LiveKit token to a client with an OpenID token
// of a Matrix server. If a client delegates its delayed leave event, the service sends the event when LiveKit reports that the client has
// disconnected. It reads the same environment variables as lk-jwt-service, and finds homeservers in the same way, by their names.
//
// With DELEGATION=off it behaves like a version of lk-jwt-service that does not accept leave events.
package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/livekit/protocol/auth"
	"github.com/livekit/protocol/livekit"
	"github.com/livekit/protocol/webhook"
	"github.com/twitchtv/twirp"
)

// tokenValidity is how long a client can join a call with a token. A client in the call stays in it after that.
const tokenValidity = time.Hour

type service struct {
	url, key, secret string
	// servers are the homeservers whose users may begin calls.
	servers []string
	rooms   livekit.RoomService
	leaves  *leaves
}

func main() {
	s := &service{
		url: os.Getenv("LIVEKIT_URL"), key: os.Getenv("LIVEKIT_KEY"), secret: os.Getenv("LIVEKIT_SECRET"),
		servers: strings.Split(os.Getenv("LIVEKIT_FULL_ACCESS_HOMESERVERS"), ","),
	}
	// LiveKit's API has the same host and port as its WebSocket.
	s.rooms = livekit.NewRoomServiceProtobufClient(strings.Replace(s.url, "ws", "http", 1), http.DefaultClient)
	mux := http.NewServeMux()
	mux.HandleFunc("/sfu/get", answer(s.token))
	mux.HandleFunc("/get_token", answer(s.token))
	if os.Getenv("DELEGATION") != "off" {
		s.leaves = newLeaves()
		mux.HandleFunc("/delegate_delayed_leave", answer(s.delegate))
		mux.HandleFunc("POST /sfu_webhook", s.webhook)
	}
	slog.Error("the end", "err", http.ListenAndServe(os.Getenv("LIVEKIT_JWT_BIND"), mux))
	os.Exit(1)
}

// answer returns an HTTP handler that pages of other origins may call.
func answer(f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Access-Control-Allow-Origin", "*")
		w.Header().Set("Access-Control-Allow-Headers", "Content-Type")
		if r.Method == http.MethodOptions {
			return
		}
		body, err := f(r)
		if err != nil {
			slog.Warn("refused", "path", r.URL.Path, "err", err)
			w.WriteHeader(http.StatusBadRequest)
			body = map[string]string{"errcode": "M_BAD_JSON", "error": err.Error()}
		}
		_ = json.NewEncoder(w).Encode(body)
	}
}

// request is the request of a client that wants to join a call.
type request struct {
	OpenIDToken struct {
		AccessToken string `json:"access_token"`
		Server      string `json:"matrix_server_name"`
	} `json:"openid_token"`
	// Clients with calls in state events send these fields.
	Room     string `json:"room"`
	DeviceID string `json:"device_id"`
	// Clients of Matrix 2.0 send these fields.
	RoomID string `json:"room_id"`
	SlotID string `json:"slot_id"`
	Member struct {
		ID       string `json:"id"`
		DeviceID string `json:"claimed_device_id"`
	} `json:"member"`
	// Clients that delegate their delayed leave event send these fields.
	DelayID      string `json:"delay_id"`
	DelayTimeout int64  `json:"delay_timeout"` // milliseconds
}

// read reads a request, and identifies its participant.
func read(r *http.Request) (req request, p participant, err error) {
	if err = json.NewDecoder(r.Body).Decode(&req); err != nil {
		return req, p, err
	}
	userID, err := whoIs(r.Context(), req.OpenIDToken.Server, req.OpenIDToken.AccessToken)
	if req.RoomID == "" {
		p = participant{room: secretName(req.Room, "m.call#ROOM"), identity: userID + ":" + req.DeviceID}
	} else {
		p = participant{room: secretName(req.RoomID, req.SlotID), identity: secretName(userID, req.Member.DeviceID, req.Member.ID)}
	}
	return req, p, err
}

// secretName returns the name of a room or a user at LiveKit. It is a hash, so LiveKit does not learn the original.
func secretName(parts ...string) string {
	text, _ := json.Marshal(parts)
	sum := sha256.Sum256(text)
	return base64.RawStdEncoding.EncodeToString(sum[:])
}

// token returns a token for the call of a Matrix room.
func (s *service) token(r *http.Request) (any, error) {
	req, p, err := read(r)
	if err != nil {
		return nil, err
	}
	if slices.Contains(s.servers, req.OpenIDToken.Server) {
		if err = s.makeRoom(r.Context(), p.room); err != nil {
			return nil, err
		}
	}
	if req.DelayID != "" {
		if err = s.entrust(r.Context(), req, p); err != nil {
			return nil, err
		}
	}
	jwt, err := auth.NewAccessToken(s.key, s.secret).SetIdentity(p.identity).SetValidFor(tokenValidity).
		SetVideoGrant(&auth.VideoGrant{RoomJoin: true, Room: p.room}).ToJWT()
	return map[string]string{"url": s.url, "jwt": jwt}, err
}

// delegate accepts the leave event of a client that is in the call.
func (s *service) delegate(r *http.Request) (any, error) {
	req, p, err := read(r)
	if err != nil {
		return nil, err
	}
	return struct{}{}, s.entrust(r.Context(), req, p)
}

func (s *service) entrust(ctx context.Context, req request, p participant) error {
	if s.leaves == nil || req.DelayTimeout <= 0 || !slices.Contains(s.servers, req.OpenIDToken.Server) {
		return fmt.Errorf("no leave event is taken")
	}
	base, err := clientAPI(ctx, req.OpenIDToken.Server)
	if err == nil {
		s.leaves.entrust(p, leave{
			url:   base + "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/" + url.PathEscape(req.DelayID),
			delay: time.Duration(req.DelayTimeout) * time.Millisecond,
		})
	}
	return err
}

// makeRoom creates a room at LiveKit, unless it exists.
func (s *service) makeRoom(ctx context.Context, name string) error {
	token, err := auth.NewAccessToken(s.key, s.secret).SetVideoGrant(&auth.VideoGrant{RoomCreate: true}).ToJWT()
	if err != nil {
		return err
	}
	ctx, err = twirp.WithHTTPRequestHeaders(ctx, http.Header{"Authorization": {"Bearer " + token}})
	if err != nil {
		return err
	}
	_, err = s.rooms.CreateRoom(ctx, &livekit.CreateRoomRequest{Name: name, EmptyTimeout: 300, DepartureTimeout: 20})
	return err
}

// webhook handles LiveKit's reports about participants that connect and disconnect.
func (s *service) webhook(_ http.ResponseWriter, r *http.Request) {
	event, err := webhook.ReceiveWebhookEvent(r, auth.NewSimpleKeyProvider(s.key, s.secret))
	if err != nil {
		slog.Warn("a webhook is not LiveKit's", "err", err)
		return
	}
	p := participant{room: event.GetRoom().GetName(), identity: event.GetParticipant().GetIdentity()}
	slog.Info("webhook", "event", event.Event, "identity", p.identity)
	switch event.Event {
	case webhook.EventParticipantJoined:
		s.leaves.joined(p)
	case webhook.EventParticipantLeft, webhook.EventParticipantConnectionAborted:
		s.leaves.left(p)
	}
}

// whoIs asks a homeserver for the user of an OpenID token.
func whoIs(ctx context.Context, server, token string) (string, error) {
	var wellKnown struct {
		Server string `json:"m.server"`
	}
	// A server without this file is at the address that its name gives.
	_ = get(ctx, "https://"+server+"/.well-known/matrix/server", &wellKnown)
	var user struct {
		ID string `json:"sub"`
	}
	err := get(ctx, "https://"+cmp.Or(wellKnown.Server, server)+"/_matrix/federation/v1/openid/userinfo?access_token="+
		url.QueryEscape(token), &user)
	if err == nil && !strings.HasSuffix(user.ID, ":"+server) {
		err = fmt.Errorf("%s vouches for %q", server, user.ID)
	}
	return user.ID, err
}

// clientAPI asks a homeserver for the URL of its client API.
func clientAPI(ctx context.Context, server string) (string, error) {
	var wellKnown struct {
		Homeserver struct {
			BaseURL string `json:"base_url"`
		} `json:"m.homeserver"`
	}
	err := get(ctx, "https://"+server+"/.well-known/matrix/client", &wellKnown)
	return strings.TrimRight(wellKnown.Homeserver.BaseURL, "/"), err
}

// get reads JSON from a URL.
func get(ctx context.Context, from string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", req.URL.Path, res.Status)
	}
	return json.NewDecoder(res.Body).Decode(into)
}
