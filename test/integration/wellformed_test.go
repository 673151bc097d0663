package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// An event that can never be sent is refused when it is scheduled, or sent as an expiring event. The error says why. No look-up fails
// afterwards.

// deep returns a JSON object with the given depth.
func deep(levels int) []byte {
	return []byte(strings.Repeat(`{"a":`, levels-1) + `{}` + strings.Repeat(`}`, levels-1))
}

// thatExpires returns a body of a send with m.will_expire.
func thatExpires(body any) any {
	if data, ok := body.([]byte); ok {
		return []byte(`{"m.will_expire":30,` + string(data[1:]))
	}
	content := maps.Clone(body.(JSON))
	content["m.will_expire"] = 30
	return content
}

// inDedicatedForm turns a send into a request of the dedicated form. The path is "" if the body cannot have the state key.
func inDedicatedForm(rooms, path string, body any) (string, any) {
	content, ok := body.([]byte)
	if !ok {
		content, _ = json.Marshal(body) // never fails
	}
	path = strings.Replace(path, stableRooms, rooms, 1)
	room, state, isState := strings.Cut(path, "/state/")
	if !isState {
		return strings.Replace(path, "/send/", "/delayed_event/", 1), fmt.Appendf(nil, `{"delay_ms":3600000,"content":%s}`, content)
	}
	eventType, key, _ := strings.Cut(state, "/")
	key, err := url.PathUnescape(key)
	if err != nil || !utf8.ValidString(key) || len(key) > 100_000 {
		return "", nil
	}
	quoted, _ := json.Marshal(key) // never fails
	return room + "/delayed_event/" + eventType + "/txn", fmt.Appendf(nil, `{"delay_ms":3600000,"content":%s,"state_key":%s}`, content, quoted)
}

func TestNothingIsScheduledThatCannotBeSent(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		alice := s.newUser(t)
		rooms := map[string]string{}
		for _, version := range []string{"10", "11", "org.matrix.msc4014"} {
			roomID, err := alice.CreateRoom(t.Context(), JSON{"room_version": version})
			require.NoError(t, err)
			rooms[version] = roomID
		}
		const long = "/_matrix/client/v3/rooms/"
		room := long + url.PathEscape(rooms["10"])
		pseudo := long + url.PathEscape(rooms["org.matrix.msc4014"])
		thirdParty := func(membership, mxid string) JSON {
			signed := JSON{"mxid": mxid, "token": "token", "signatures": JSON{"localhost": JSON{"ed25519:0": "x"}}}
			return JSON{"membership": membership, "third_party_invite": JSON{"display_name": "B", "signed": signed}}
		}
		for name, test := range map[string]struct {
			path    string // the delay is appended to it
			body    any
			code    int
			errcode string
		}{
			"long type":       {room + "/state/" + strings.Repeat("t", 256) + "/", JSON{}, 413, "M_BAD_JSON"},
			"very long type":  {room + "/send/" + strings.Repeat("t", 50_000) + "/txn1", JSON{}, 413, "M_BAD_JSON"},
			"very long key":   {room + "/state/m/" + strings.Repeat("k", 50_000), JSON{}, 413, "M_BAD_JSON"},
			"1 MB of type":    {room + "/send/" + strings.Repeat("t", 900_000) + "/txn1", JSON{}, 431, ""}, // refused by Go's server
			"200 KB of key":   {room + "/state/m/" + strings.Repeat("k", 200_000), JSON{}, 431, ""},
			"type no UTF-8":   {room + "/state/%ff/key", JSON{}, 400, "M_INVALID_PARAM"},
			"type with NUL":   {room + "/send/m%00/txn2", JSON{}, 400, "M_INVALID_PARAM"},
			"key no UTF-8":    {room + "/state/m/%ff", JSON{}, 400, "M_INVALID_PARAM"},
			"key with NUL":    {room + "/state/m/%00", JSON{}, 400, "M_INVALID_PARAM"},
			"room nope":       {long + "nope/state/m/key", JSON{}, 400, "M_INVALID_PARAM"},
			"room with NUL":   {long + "%21r%00:localhost/state/m/key", JSON{}, 400, "M_INVALID_PARAM"},
			"room no UTF-8":   {long + "%21%ff:localhost/send/m/txn3", JSON{}, 400, "M_INVALID_PARAM"},
			"too deep":        {room + "/state/m/key", deep(201), 400, "M_BAD_JSON"},
			"much too deep":   {room + "/state/m/key", deep(15_000), 400, "M_BAD_JSON"},
			"fraction":        {room + "/state/m/key", JSON{"a": 0.5}, 400, "M_BAD_JSON"},
			"create":          {room + "/state/m.room.create/", JSON{"room_version": "10"}, 403, "M_FORBIDDEN"},
			"membership 1":    {room + "/state/m.room.member/" + alice.UserID, JSON{"membership": 1}, 400, "M_BAD_JSON"},
			"knock":           {room + "/state/m.room.member/" + alice.UserID, JSON{"membership": "knock"}, 403, "M_FORBIDDEN"},
			"banana":          {room + "/state/m.room.member/@bob:localhost", thirdParty("banana", "@bob:localhost"), 403, "M_FORBIDDEN"},
			"invite of bob":   {room + "/state/m.room.member/@bob:localhost", thirdParty("invite", "@other:localhost"), 403, "M_FORBIDDEN"},
			"pseudo bob":      {pseudo + "/state/m.room.member/@bob", JSON{"membership": "leave"}, 400, "M_INVALID_PARAM"},
			"alias 1":         {room + "/state/m.room.canonical_alias/", JSON{"alias": 1}, 400, "M_BAD_JSON"},
			"levels 1":        {room + "/state/m.room.power_levels/", JSON{"users": 1}, 403, "M_FORBIDDEN"},
			"pseudo levels 1": {pseudo + "/state/m.room.power_levels/", JSON{"users": 1}, 400, "M_BAD_JSON"},
			"name 5":          {room + "/state/m.room.member/" + alice.UserID, JSON{"membership": "join", "displayname": 5}, 400, "M_BAD_JSON"},
			"pseudo name 5":   {pseudo + "/state/m.room.member/" + alice.UserID, JSON{"membership": "join", "displayname": 5}, 400, "M_BAD_JSON"},
			"pseudo mapping":  {pseudo + "/state/m.room.member/" + alice.UserID, JSON{"membership": "join", "mxid_mapping": JSON{}}, 400, "M_BAD_JSON"},
			"pseudo invite":   {pseudo + "/state/m.room.member/@bob:localhost", JSON{"membership": "invite"}, 403, "M_FORBIDDEN"},
			"levels 2":        {room + "/state/m.room.power_levels/", JSON{"users": JSON{"bob": 1}}, 403, "M_FORBIDDEN"},
			"alias of nobody": {room + "/state/m.room.canonical_alias/", JSON{"alias": "nobody"}, 400, "M_INVALID_PARAM"},
			"aliases":         {room + "/state/m.room.aliases/elsewhere", JSON{"aliases": []string{}}, 403, "M_FORBIDDEN"},
			"tombstone":       {room + "/state/m.room.tombstone/", JSON{"replacement_room": rooms["10"]}, 400, "M_INVALID_PARAM"},
			"key of bob":      {room + "/state/m/@bob:localhost", JSON{}, 403, "M_FORBIDDEN"},
			"redaction":       {room + "/send/m.room.redaction/txn4", JSON{"redacts": "$x"}, 403, "M_FORBIDDEN"},
			"too large":       {room + "/state/m/key", JSON{"x": strings.Repeat("x", 65_400)}, 413, "M_BAD_JSON"},
			"join of bob":     {room + "/state/m.room.member/@bob:localhost", JSON{"membership": "join"}, 403, "M_FORBIDDEN"},
			"no token":        {room + "/state/m.room.member/@bob:localhost", JSON{"membership": "invite", "third_party_invite": JSON{}}, 400, "M_BAD_JSON"},
			"pseudo bad key":  {pseudo + "/state/m/@bob", JSON{}, 400, "M_BAD_JSON"},
		} {
			for how, written := range map[string]func(path string, body any) (string, any){
				"delayed":            func(path string, body any) (string, any) { return path + delayParameter + "3600000", body },
				"dedicated":          func(path string, body any) (string, any) { return inDedicatedForm(stableRooms, path, body) },
				"dedicated unstable": func(path string, body any) (string, any) { return inDedicatedForm(unstableRooms, path, body) },
				"expiring":           func(path string, body any) (string, any) { return path, thatExpires(body) },
			} {
				path, body := written(test.path, test.body)
				if path == "" {
					continue
				}
				t.Run(name+", "+how, func(t *testing.T) {
					res := alice.do(t, http.MethodPut, path, body)
					require.Equal(t, test.code, res.Code, res)
					require.Equal(t, test.errcode, res.Get("errcode").Str, res)
					require.Equal(t, test.errcode == "", res.Get("error").Str == "", res)
				})
			}
		}
		require.Empty(t, alice.scheduled(t))
		for _, delay := range []string{"%2B1000", "%201000", "1e3", "1000.0", "0x10", "-1"} {
			res := alice.do(t, http.MethodPut, room+"/state/m/key"+delayParameter+delay, JSON{})
			require.Equal(t, http.StatusBadRequest, res.Code, delay)
			require.Equal(t, "M_INVALID_PARAM", res.Get("errcode").Str)
		}
		// In a room with pseudo IDs a look-up shows the state key that the client gave.
		own := delayID(t, alice.must(t, http.MethodPut, pseudo+"/state/m/"+alice.UserID+delayParameter+"3600000", JSON{}))
		require.Equal(t, alice.UserID, alice.delayed(t, own).Get("state_key").Str)
		alice.acted(t, stableDelayed, own, "cancel")
		// Any state key that a plain send takes can be that of a member.
		for _, key := range []string{"bob", "@é1:localhost", "@a b:localhost", "@x:a_b"} {
			path := room + "/state/m.room.member/" + url.PathEscape(key)
			id := delayID(t, alice.must(t, http.MethodPut, path+delayParameter+"3600000", JSON{"membership": "ban"}))
			alice.acted(t, stableDelayed, id, "send")
			require.Equal(t, "ban", alice.must(t, http.MethodGet, path, nil).Get("membership").Str, key)
			alice.must(t, http.MethodPut, room+"/state/m.room.name/", JSON{"name": key}) // the room goes on
		}
		// Events at the limits can be scheduled, looked up and sent.
		for _, roomID := range rooms {
			path := long + url.PathEscape(roomID) + "/state/" + strings.Repeat("t", 255) + "/" + strings.Repeat("k", 255)
			id := delayID(t, alice.must(t, http.MethodPut, path+delayParameter+"3600000", deep(200)))
			require.Equal(t, []string{id}, alice.scheduled(t))
			alice.acted(t, stableDelayed, id, "send")
			require.NotEmpty(t, alice.finalised(t, id).Get("event_id").Str)
		}
	})
}

// JSON that is nested too deeply does not reach Dendrite, whatever request contains it.
func TestDeepRequestsAreRefused(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		alice, bob := s.newUser(t), s.newUser(t)
		roomID := s.room(t, alice, bob)
		f := bob.follow(t, roomID)
		content := string(deep(9_993))
		for method, paths := range map[string]map[string]string{
			http.MethodPut: {
				homeserver.SendPath(roomID, "m.room.message"):                            content,
				homeserver.StatePath(roomID, memberType, ""):                             content,
				"/_matrix/client/v3/sendToDevice/m.x/1":                                  `{"messages":{"` + bob.UserID + `":{"*":` + content + `}}}`,
				"/_matrix/client/v3/user/" + alice.UserID + "/account_data/m.x":          content,
				homeserver.SendPath(roomID, "m.room.message") + delayParameter + "60000": content,
			},
			http.MethodPost: {
				"/_matrix/client/v3/createRoom": `{"initial_state":[{"type":"m.x","state_key":"","content":` + content + `}]}`,
				"/_matrix/client/v3/keys/query": `{"device_keys":` + content + `}`,
			},
		} {
			for path, body := range paths {
				res := alice.do(t, method, path, []byte(body))
				require.Equal(t, http.StatusBadRequest, res.Code, "%s: %s", path, res)
				require.Equal(t, "M_BAD_JSON", res.Get("errcode").Str, path)
				require.Equal(t, "*", res.Header.Get("Access-Control-Allow-Origin"), path)
			}
		}
		// None of these events has reached the room. An event at the limit reaches all members.
		id := alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), deep(200)).Get("event_id").Str
		f.awaitEvent(t, id)
	})
}

// A list of many large events is paginated, also for concurrent requests.
func TestListIsPaginated(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		alice := s.newUser(t)
		roomID := s.room(t, alice)
		const count = 40
		for i := range count {
			alice.delayMessage(t, roomID, time.Hour+time.Duration(i)*time.Second, strings.Repeat("x", 60_000))
		}
		var lists sync.WaitGroup
		for range 10 {
			lists.Go(func() {
				seen := 0
				for from := ""; ; {
					ctx, cancel := context.WithTimeout(t.Context(), afterQueue)
					res, err := alice.Do(ctx, http.MethodGet, unstableDelayed+"?from="+url.QueryEscape(from), nil)
					cancel()
					if err != nil || res.Code != http.StatusOK || len(res.Body) > 1<<20 {
						t.Errorf("a page of %d bytes: HTTP %d, %v", len(res.Body), res.Code, err)
						return
					}
					seen += len(res.Get("delayed_events").Array())
					if from = res.Get("next_batch").Str; from == "" {
						break
					}
				}
				if seen != count {
					t.Errorf("the list has %d events", seen)
				}
			})
		}
		lists.Wait()
	})
}

// No spelling of a delay ID gets it into the log. The cleanup of start searches the log for it.
func TestSpelledDelayIDsAreNotLogged(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		alice := s.newUser(t)
		id := alice.delayMessage(t, s.room(t, alice), time.Hour, "x")
		spelled := fmt.Sprintf("%%%02X", id[0]) + id[1:]
		for path, list := range map[string]int{stableDelayed: 404, unstableDelayed: 200} {
			for _, request := range []struct {
				method, path string
				body         any
				code         int
			}{
				{http.MethodGet, "/" + spelled, nil, 200},
				{http.MethodPost, "/" + spelled + "/restart", JSON{}, 200},
				{http.MethodPost, "/" + spelled + "/re%73tart", JSON{}, 200},
				{http.MethodGet, "?delay_id=" + id, nil, list},
				{http.MethodPost, "/restart/" + id, JSON{}, 404},
				{http.MethodGet, "/" + id + "/restart", nil, 405},
				{http.MethodGet, "/" + id + "%00", nil, 404},
				{http.MethodGet, "/%ff", nil, 404},
				{http.MethodGet, "/%00", nil, 404},
				{http.MethodPost, "/%00/send", JSON{}, 404},
				{http.MethodPost, "/%ff/cancel", JSON{}, 404},
			} {
				res, err := alice.Do(t.Context(), request.method, path+request.path, request.body, "Referer", s.URL+path+"/"+id)
				require.NoError(t, err)
				require.Equal(t, request.code, res.Code, "%s %s: %s", request.method, path+request.path, res)
			}
		}
	})
}

// Users of an application service have a limit of their own for scheduled events, and may give their events a time. No limit is there for
// those that then expire, or that are due at once.
func TestDelayedEventsOfApplicationServices(t *testing.T) {
	t.Parallel()
	registration := bridge(t)
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			s := start(t, homeserver.Config{
				Postgres: db.open(t), Expiration: JSON{
					"max_running_per_user": 1, "delayed_events": JSON{"max_scheduled_per_user": 1, "max_scheduled_per_service_user": 3},
					"rate_limiting": JSON{"due": JSON{"threshold": 1, "cooloff_ms": 3600000}},
				}, AppServices: []string{registration},
			})
			bridge := &user{&homeserver.Client{URL: s.URL, UserID: "@bridge:localhost", Token: "as-token"}, s}
			roomID, err := bridge.CreateRoom(t.Context(), nil)
			require.NoError(t, err)
			bridge.sendMessage(t, roomID, 3600)
			id := delayID(t, bridge.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+delayParameter+"1",
				JSON{"m.will_expire": 3600, "body": "x"}))
			require.NotEmpty(t, bridge.finalised(t, id).Get("event_id").Str)
			shown := bridge.must(t, http.MethodGet, "/_matrix/client/v3/capabilities", nil).Get(`capabilities.m\.delayed_events.max_scheduled`)
			require.EqualValues(t, 3, shown.Int())
			for _, ts := range []string{"0", "1600000000000"} {
				id = delayID(t, bridge.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+delayParameter+"1&ts="+ts, JSON{"body": ts}))
				e := bridge.event(t, roomID, bridge.finalised(t, id).Get("event_id").Str)
				require.Equal(t, ts, fmt.Sprint(e.Get("origin_server_ts").Int()))
			}
			for _, ts := range []string{"-1", "9223372036855", "soon"} {
				res := bridge.do(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+delayParameter+"1&ts="+ts, JSON{})
				require.Equal(t, http.StatusBadRequest, res.Code, ts)
				require.Equal(t, "M_INVALID_PARAM", res.Get("errcode").Str)
			}
			before := time.Now().UnixMilli()
			id = delayID(t, bridge.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+delayParameter+"2000&ts=", JSON{}))
			e := bridge.event(t, roomID, bridge.finalised(t, id).Get("event_id").Str)
			require.GreaterOrEqual(t, e.Get("origin_server_ts").Int(), before+2000, "an empty ts is ignored")
			for _, parameter := range []string{delayParameter + "1000&", "?"} {
				res := bridge.do(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+parameter+"user_id=bridge", JSON{})
				require.Equal(t, http.StatusBadRequest, res.Code, res)
				require.Equal(t, "M_BAD_JSON", res.Get("errcode").Str)
			}
			for range 3 {
				bridge.delayMessage(t, roomID, time.Hour, "x")
			}
			res := bridge.do(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+delayParameter+"1000", JSON{})
			require.Equal(t, http.StatusTooManyRequests, res.Code, res)
			alice := s.newUser(t)
			require.NoError(t, alice.Join(t.Context(), roomID), "the room is public")
			id = delayID(t, alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+delayParameter+"1&ts=1600000000000",
				JSON{"body": "new"}))
			e = alice.event(t, roomID, alice.finalised(t, id).Get("event_id").Str)
			require.Greater(t, e.Get("origin_server_ts").Int(), int64(1600000000000), "a user's ts is ignored")

			// The bridge may not act for alice, whatever it asks for.
			id = alice.delayMessage(t, roomID, time.Hour, "alice's")
			as := "user_id=" + url.QueryEscape(alice.UserID)
			send := homeserver.SendPath(roomID, "m.room.message")
			_, scheduling := inDedicatedForm(unstableRooms, send, JSON{})
			for _, request := range []struct {
				method, path string
				body         any
			}{
				{http.MethodPut, send + delayParameter + "1000&" + as, JSON{}},
				{http.MethodPut, strings.Replace(send, "/send/", "/delayed_event/", 1) + "?" + as, scheduling},
				{http.MethodPost, unstableDelayed + "/" + id + "/cancel?" + as, nil},
				{http.MethodPost, unstableDelayed + "/" + id + "?" + as, JSON{"action": "cancel"}},
				{http.MethodPost, stableDelayed + "/" + id + "/cancel?" + as, nil},
				{http.MethodGet, stableDelayed + "/" + id + "?" + as, nil},
			} {
				res = bridge.do(t, request.method, request.path, request.body)
				require.Equal(t, http.StatusForbidden, res.Code, "%s: %s", request.path, res)
				require.Equal(t, "M_FORBIDDEN", res.Get("errcode").Str)
			}
			require.False(t, alice.delayed(t, id).Get("finalised").Exists())
		})
	}
}

// A NUL character, which PostgreSQL cannot store, neither ends the process nor blocks a user's /sync.
func TestNULs(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		alice, bob := s.newUser(t), s.newUser(t)
		roomID := s.room(t, alice, bob)
		f := bob.follow(t, roomID)
		room := "/_matrix/client/v3/rooms/" + url.PathEscape(roomID)
		relation := JSON{"m.relates_to": JSON{"event_id": "$x", "rel_type": "\x00"}}
		hello := alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), JSON{"body": "\x00"}).Get("event_id").Str
		for _, test := range []struct {
			path string
			body JSON
		}{
			{room + "/send/m.room.message/%00", JSON{"body": "x"}},
			{room + "/send/m.room.message/%00", JSON{"m.will_expire": 30}},
			{room + "/redact/" + url.PathEscape(hello) + "/%00", JSON{}},
			{room + "/send/m.room.message/txn1", relation},
			{room + "/state/m.x/key", relation},
			{room + "/state/m.x/key" + delayParameter + "1", relation},
			{room + "/send/m.room.redaction/txn2", JSON{"redacts": "\x00"}},
		} {
			res := alice.do(t, http.MethodPut, test.path, test.body)
			require.Equal(t, http.StatusBadRequest, res.Code, "%s: %s", test.path, res)
			require.NotEmpty(t, res.Get("errcode").Str)
		}
		f.awaitEvent(t, alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), JSON{"body": "y"}).Get("event_id").Str)
	})
}
