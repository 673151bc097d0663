package rtc

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

type JSON = map[string]any

const (
	sfuURL      = "wss://sfu.a.example/livekit"
	otherSFU    = "wss://sfu.b.example"
	servicePath = "/_matrix/client/unstable/io.element.msc4195/livekit"
	roomID      = "!room:a.example"
	slotID      = "m.call#ROOM"
	keyID       = gomatrixserverlib.KeyID("ed25519:1")
)

// paths are the paths of get_token, without the prefix of an API.
var paths = []string{"/v1/rtc/livekit/get_token", "/unstable/io.element.msc4195/rtc/livekit/get_token"}

var errAway = errors.New("away")

// world is the server a.example, and everything around it.
type world struct {
	t       *testing.T
	cfg     TokenConfig
	parts   Parts
	rooms   *fakeRooms
	sfu     *fakeSFU
	keeper  *fakeKeeper
	users   *fakeUsers
	servers *fakeServers
	client  HTTP // servers
	routers httputil.Routers
	tokens  *Tokens
}

// newWorld returns a world in which alice, bob, a guest, a service, carol of b.example and dave of c.example are in roomID. change may change it before it
// starts.
func newWorld(t *testing.T, change func(*world)) *world {
	w := &world{
		t:   t,
		cfg: TokenConfig{URL: sfuURL, ServicePath: servicePath, FullAccessServers: []string{"a.example"}},
		rooms: &fakeRooms{rooms: map[string][]string{
			roomID:             {"@alice:a.example", "@bob:a.example", "@carol:b.example", "@dave:c.example", "@7:a.example", "@service:a.example"},
			"!alone:a.example": {"@alice:a.example"},
			"!left:b.example":  {"@carol:b.example"},
			"!acl:a.example":   {"@alice:a.example", "@carol:b.example"},
		}, banned: map[string]string{"!acl:a.example": "b.example"}},
		sfu: &fakeSFU{rooms: map[string]bool{}}, keeper: &fakeKeeper{},
		users:   &fakeUsers{openID: map[string]string{"openid-alice": "@alice:a.example", "openid-erin": "@erin:a.example"}},
		servers: &fakeServers{key: ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))},
		routers: httputil.NewRouters(),
	}
	w.client = w.servers
	w.parts = Parts{SFU: w.sfu, Participants: w.keeper, Delegations: w.keeper, TokenDelegations: w.keeper, Hints: w.keeper}
	global := &config.Global{SigningIdentity: fclient.SigningIdentity{ServerName: "a.example", KeyID: keyID, PrivateKey: w.servers.key}}
	w.parts.Rooms = NewRooms(w.rooms, global.IsLocalServerName)
	if change != nil {
		change(w)
	}
	w.tokens = NewTokens(w.cfg, global, w.parts)
	w.tokens.AddRoutes(w.routers, w.users, Federation{KeyRing: w.servers, Client: w.client})
	return w
}

// answer is the answer to a request.
type answer struct {
	*httptest.ResponseRecorder
	gjson.Result
}

func (w *world) serve(router http.Handler, req *http.Request) answer {
	rec := httptest.NewRecorder()
	router.ServeHTTP(rec, req)
	return answer{rec, gjson.ParseBytes(rec.Body.Bytes())}
}

// ask sends a request of a user, or of nobody, to the client API.
func (w *world) ask(path, user string, body any) answer {
	req := httptest.NewRequest(http.MethodPost, "/_matrix/client"+path, bytes.NewReader(encode(w.t, body)))
	if user != "" {
		req.Header.Set("Authorization", "Bearer "+user)
	}
	return w.serve(w.routers.Client, req)
}

// askAs sends a request of another server to the federation API.
func (w *world) askAs(origin spec.ServerName, path string, body any) answer {
	signed := fclient.NewFederationRequest(http.MethodPost, origin, "a.example", "/_matrix/federation"+path)
	require.NoError(w.t, signed.SetContent(body))
	require.NoError(w.t, signed.Sign(origin, keyID, w.servers.key))
	req, err := signed.HTTPRequest()
	require.NoError(w.t, err)
	return w.serve(w.routers.Federation, req)
}

func encode(t *testing.T, body any) []byte {
	if text, ok := body.(string); ok {
		return []byte(text)
	}
	data, err := json.Marshal(body)
	require.NoError(t, err)
	return data
}

// with returns a body with other fields. A field of nil is left out.
func with(body JSON, changes JSON) JSON {
	body = maps.Clone(body)
	maps.Copy(body, changes)
	maps.DeleteFunc(body, func(_ string, value any) bool { return value == nil })
	return body
}

// refused requires an answer with an error.
func refused(t *testing.T, a answer, status int, errcode string) {
	t.Helper()
	require.Equal(t, status, a.Code, a.Body)
	require.Equal(t, errcode, a.Get("errcode").Str, a.Body)
	require.Equal(t, "*", a.Header().Get("Access-Control-Allow-Origin"))
}

// fakeRooms is the roomserver.
type fakeRooms struct {
	rooms  map[string][]string // the joined users by room
	banned map[string]string   // a server by room
	state  []string            // the events of roomID
	err    error
}

func (f *fakeRooms) QueryServerJoinedToRoom(
	_ context.Context, req *api.QueryServerJoinedToRoomRequest, res *api.QueryServerJoinedToRoomResponse,
) error {
	server := string(req.ServerName)
	if server == "" {
		server = "a.example"
	}
	for _, user := range f.rooms[req.RoomID] {
		res.IsInRoom = res.IsInRoom || strings.HasSuffix(user, ":"+server) || server == "%" // Dendrite's SQL has LIKE
	}
	return f.err
}

func (f *fakeRooms) QueryServerBannedFromRoom(
	_ context.Context, req *api.QueryServerBannedFromRoomRequest, res *api.QueryServerBannedFromRoomResponse,
) error {
	res.Banned = f.banned[req.RoomID] == string(req.ServerName)
	return f.err
}

func (f *fakeRooms) QueryMembershipForUser(
	_ context.Context, req *api.QueryMembershipForUserRequest, res *api.QueryMembershipForUserResponse,
) error {
	for _, user := range f.rooms[req.RoomID] {
		res.IsInRoom = res.IsInRoom || user == req.UserID.String()
	}
	return f.err
}

func (f *fakeRooms) QueryCurrentState(_ context.Context, req *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse) error {
	res.StateEvents = map[gomatrixserverlib.StateKeyTuple]*types.HeaderedEvent{}
	for _, text := range f.state {
		event, err := gomatrixserverlib.MustGetRoomVersion(gomatrixserverlib.RoomVersionV10).NewEventFromTrustedJSON([]byte(text), false)
		if err != nil {
			return err
		}
		for _, tuple := range req.StateTuples {
			if req.AllowWildcards && tuple.StateKey == "*" && tuple.EventType == event.Type() {
				tuple.StateKey = *event.StateKey()
				res.StateEvents[tuple] = &types.HeaderedEvent{PDU: event}
			}
		}
	}
	return f.err
}

func (f *fakeRooms) QueryUserIDForSender(_ context.Context, _ spec.RoomID, sender spec.SenderID) (*spec.UserID, error) {
	return spec.NewUserID(string(sender), true)
}

// fakeSFU is LiveKit. Its tokens are their grants.
type fakeSFU struct {
	rooms map[string]bool
	err   error
}

func (f *fakeSFU) CreateRoom(_ context.Context, name string) (livekit.Room, error) {
	if f.err == nil {
		f.rooms[name] = true
	}
	return livekit.Room{Name: name}, f.err
}

func (f *fakeSFU) Room(_ context.Context, name string) (livekit.Room, error) {
	if f.err == nil && !f.rooms[name] {
		return livekit.Room{}, fmt.Errorf("looking: %w", livekit.ErrNotFound)
	}
	return livekit.Room{Name: name}, f.err
}

func (f *fakeSFU) Token(g livekit.Grant) (string, error) {
	if !f.rooms[g.Room] {
		return "", errors.New("the room was not made")
	}
	return fmt.Sprintf("%s %s %v", g.Room, g.Identity, g.Publish), nil
}

// tokenFor is the token that a fakeSFU makes.
func tokenFor(publish bool, room string, identity string) string {
	return fmt.Sprintf("%s %s %v", livekit.RoomName(room, slotID), identity, publish)
}

func (f *fakeSFU) Hear(authorization string, body []byte) (livekit.Event, error) {
	if authorization != "signed" {
		return livekit.Event{}, errors.New("forged")
	}
	return livekit.Event{SID: string(body)}, nil
}

// fakeKeeper is Participants, Delegations, TokenDelegations and Hints.
type fakeKeeper struct {
	remembered []Participant
	leaves     []Leave
	tokens     []livekit.Participant // of alice in roomID, whose timer every token is
	hints      []livekit.Event
	err        error // of all but Hint
}

func (f *fakeKeeper) Remember(_ context.Context, p Participant) error {
	f.remembered = append(f.remembered, p)
	return f.err
}

func (f *fakeKeeper) DelegateLeave(_ context.Context, l Leave) error {
	f.leaves = append(f.leaves, l)
	return f.err
}

func (f *fakeKeeper) DelegateToken(
	_ context.Context, _ [32]byte, participant func(userID, roomID string) (livekit.Participant, error),
) error {
	if f.err != nil {
		return f.err
	}
	p, err := participant("@alice:a.example", roomID)
	if err != nil {
		return fmt.Errorf("handing over: %w", err)
	}
	f.tokens = append(f.tokens, p)
	return nil
}

func (f *fakeKeeper) Hint(e livekit.Event) { f.hints = append(f.hints, e) }

// fakeUsers is the user API. Access tokens are user IDs. One user is a guest, and one is an application service.
type fakeUsers struct {
	openID  map[string]string // users by OpenID token
	expired bool
	err     error
}

func (f *fakeUsers) QueryAccessToken(_ context.Context, req *userapi.QueryAccessTokenRequest, res *userapi.QueryAccessTokenResponse) error {
	if strings.HasPrefix(req.AccessToken, "@") {
		res.Device = &userapi.Device{UserID: req.AccessToken, AccountType: userapi.AccountTypeUser}
	}
	switch req.AccessToken {
	case "@7:a.example":
		res.Device.AccountType = userapi.AccountTypeGuest
	case "@service:a.example":
		res.Device.AccountType = userapi.AccountTypeAppService
	}
	return nil
}

func (f *fakeUsers) QueryOpenIDToken(_ context.Context, req *userapi.QueryOpenIDTokenRequest, res *userapi.QueryOpenIDTokenResponse) error {
	res.Sub, res.ExpiresAtMS = f.openID[req.Token], time.Now().Add(time.Minute).UnixMilli()
	if f.expired {
		res.ExpiresAtMS = time.Now().Add(-time.Second).UnixMilli()
	}
	if res.Sub == "" && f.err == nil {
		return sql.ErrNoRows
	}
	return f.err
}

// fakeServers are the other servers. All have the same key.
type fakeServers struct {
	key    ed25519.PrivateKey
	asked  []string
	answer func(req *http.Request, body gjson.Result) (status int, answer string)
}

// DoHTTPRequest answers a request of a.example, if its context lives that long.
func (f *fakeServers) DoHTTPRequest(ctx context.Context, req *http.Request) (*http.Response, error) {
	f.asked = append(f.asked, req.URL.Host+req.URL.Path)
	var body []byte
	if req.Body != nil {
		body, _ = io.ReadAll(req.Body)
		req.Body = io.NopCloser(bytes.NewReader(body))
		signed, refused := fclient.VerifyHTTPRequest(req, time.Now(), spec.ServerName(req.URL.Host), nil, f)
		if signed == nil || signed.Origin() != "a.example" {
			return nil, fmt.Errorf("not signed: %v", refused)
		}
	}
	if f.answer == nil {
		return nil, errAway
	}
	status, text := f.answer(req.WithContext(ctx), gjson.ParseBytes(body))
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: status, Body: io.NopCloser(strings.NewReader(text))}, nil
}

// VerifyJSONs verifies the signatures of a server that is not evil.example.
func (f *fakeServers) VerifyJSONs(_ context.Context, requests []gomatrixserverlib.VerifyJSONRequest) ([]gomatrixserverlib.VerifyJSONResult, error) {
	results := make([]gomatrixserverlib.VerifyJSONResult, len(requests))
	for i, r := range requests {
		results[i].Error = gomatrixserverlib.VerifyJSON(string(r.ServerName), keyID, f.key.Public().(ed25519.PublicKey), r.Message)
		if r.ServerName == "evil.example" {
			results[i].Error = errors.New("another key")
		}
	}
	return results, nil
}
