package clientapi

import (
	"context"
	"errors"
	"iter"
	"net/http"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

const (
	unstablePath = "/_matrix/client/unstable/org.matrix.msc4140"
	stablePath   = "/_matrix/client/v1"
	delayID      = "9GkC3sQyXbWm0TnRzP4vJ7hLdE1aUoF6iY2cBtKxZ8M"
)

// schedule is a call of Scheduler.Schedule.
type schedule struct {
	event   expiration.Event
	delayed expiration.Delayed
	delay   time.Duration
}

// planner is a fake Scheduler, Actor and Finder. It records the calls, and answers with what the test put into its fields.
type planner struct {
	scheduled []schedule
	before    string // the answer to an earlier request
	err       error
	acts      []string
	asked     expiration.Bucket
	events    []expiration.DelayedEvent
	read      int // how many events were read
}

func (p *planner) Scheduled(context.Context, expiration.RequestHash) (string, error) {
	return p.before, nil
}

func (p *planner) Schedule(
	_ context.Context, e expiration.Event, d expiration.Delayed, delay time.Duration, _ bool,
) (string, error) {
	p.scheduled = append(p.scheduled, schedule{e, d, delay})
	return delayID, p.err
}

func (p *planner) AllowDelayed(id string) (known bool, wait time.Duration) {
	if id != delayID || errors.As(p.err, new(*expiration.FinalisedError)) {
		return false, 0
	}
	return true, p.asked.Take(twice, time.Hour)
}

func (p *planner) act(action, id, owner string) error {
	p.acts = append(p.acts, action+" "+owner)
	if id != delayID {
		return expiration.ErrNotFound
	}
	return p.err
}

func (p *planner) RestartDelayed(_ context.Context, id, owner string) error {
	return p.act("restart", id, owner)
}
func (p *planner) SendDelayed(_ context.Context, id, owner string) error {
	return p.act("send", id, owner)
}
func (p *planner) CancelDelayed(_ context.Context, id, owner string) error {
	return p.act("cancel", id, owner)
}

func (p *planner) DelayedEvents(_ context.Context, owner, after string) iter.Seq2[expiration.DelayedEvent, error] {
	return func(yield func(expiration.DelayedEvent, error) bool) {
		p.acts = append(p.acts, "list "+owner)
		for _, e := range p.events {
			if e.Place > after || after == "" {
				p.read++
				if !yield(e, p.err) {
					return
				}
			}
		}
	}
}

func (p *planner) DelayedEvent(_ context.Context, id, owner string) (expiration.DelayedEvent, error) {
	if err := p.act("look", id, owner); err != nil {
		return expiration.DelayedEvent{}, err
	}
	return p.events[0], nil
}

// rooms is a fake roomserver with three rooms: Alice is in two of them, and has left one. !powers has power levels, and Alice has 10.
type rooms struct{ dendrite }

func (rooms) QueryMembershipForUser(
	_ context.Context, req *api.QueryMembershipForUserRequest, res *api.QueryMembershipForUserResponse,
) error {
	res.IsInRoom = req.RoomID == "!room:localhost" || req.RoomID == "!powers:localhost"
	res.RoomExists = res.IsInRoom || req.RoomID == "!left:localhost"
	return nil
}

func (rooms) QueryCurrentState(_ context.Context, req *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse) error {
	if req.RoomID != "!powers:localhost" {
		return nil
	}
	tuple := gomatrixserverlib.StateKeyTuple{EventType: "m.room.power_levels"}
	levels, err := gomatrixserverlib.MustGetRoomVersion(gomatrixserverlib.RoomVersionV10).NewEventFromTrustedJSON([]byte(
		`{"type":"m.room.power_levels","state_key":"","sender":"@bob:localhost","room_id":"!powers:localhost","depth":1,`+
			`"content":{"users":{"@alice:localhost":10},"events":{"m.low":10,"m.high":11},"state_default":10,"events_default":11}}`), false)
	res.StateEvents = map[gomatrixserverlib.StateKeyTuple]*types.HeaderedEvent{tuple: {PDU: levels}}
	return err
}

func (rooms) QuerySenderIDForUser(_ context.Context, _ spec.RoomID, userID spec.UserID) (*spec.SenderID, error) {
	id := spec.SenderID(userID.String())
	return &id, nil
}

func (rooms) QueryUserIDForSender(_ context.Context, _ spec.RoomID, id spec.SenderID) (*spec.UserID, error) {
	if id != "key of bob" {
		return nil, errors.New("no user's key")
	}
	return spec.NewUserID("@bob:localhost", true)
}

func (rooms) Hooked(req *http.Request, _ *expiration.Hook) (*http.Request, api.ClientRoomserverAPI) {
	return req, rooms{}
}

func (rooms) LockSender(context.Context, string, string) (func(), error) { return func() {}, nil }

func (rooms) QueryRoomVersionForRoom(context.Context, string) (gomatrixserverlib.RoomVersion, error) {
	return gomatrixserverlib.RoomVersionV10, nil
}

// twice is the rate limit in these tests: two requests at once, and then one every half hour.
var twice = expiration.RateLimit{Threshold: 2, Cooloff: time.Hour}

func (p *planner) timers() Timers { return Timers{Keeper: atOnce{}, Scheduler: p, Actor: p, Finder: p} }

// newPlanned returns the routes as Dendrite serves them.
func newPlanned(p *planner, maxScheduled int) http.Handler {
	a := New(Config{
		MaxDuration: time.Hour, MaxDelay: 24 * time.Hour, MaxScheduled: maxScheduled, MaxScheduledOfService: 7,
		UnknownTokens: twice,
	}, &config.ClientAPI{}, rooms{}, p.timers())
	routers := httputil.NewRouters()
	a.AddRoutes(routers.Client, dendrite{})
	return routers.Client
}

// do sends a request, with Alice's access token if it is authorized.
func do(handler http.Handler, method, path, body string, authorized bool) *httptest.ResponseRecorder {
	token := ""
	if authorized {
		token = "token"
	}
	return doWith(handler, method, path, body, token)
}

// doWith sends a request with an access token, if there is one.
func doWith(handler http.Handler, method, path, body, token string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(method, path, strings.NewReader(body))
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, req)
	return w
}

// errcode returns the code of a Matrix error.
func errcode(w *httptest.ResponseRecorder) string { return gjson.Get(w.Body.String(), "errcode").Str }
