package integration

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// docs/protocol.md, section 1: sending an expiring event.

func TestSending(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, nil, func(t *testing.T, s *server) {
		alice, bob := s.newUser(t), s.newUser(t)
		roomID := s.room(t, alice, bob)
		t.Run("EveryPathAndForm", func(t *testing.T) { testForms(t, alice, bob, roomID) })
		t.Run("Values", func(t *testing.T) { testValues(t, alice, roomID) })
		t.Run("WithoutTheField", func(t *testing.T) { testWithoutField(t, alice, roomID) })
		t.Run("ContentIsUntouched", func(t *testing.T) { testContent(t, alice, roomID) })
		t.Run("Guests", func(t *testing.T) { testGuests(t, s, alice) })
		t.Run("RetriedMessage", func(t *testing.T) { testRetriedMessage(t, s, alice, roomID) })
		t.Run("ImpatientClient", func(t *testing.T) { testImpatientClient(t, alice, roomID) })
		t.Run("RepeatedState", func(t *testing.T) { testRepeatedState(t, s, alice, roomID) })
		t.Run("NobodyGetsTheTokenOfAnother", func(t *testing.T) { testTokenOfAnother(t, s, alice, bob, roomID) })
		t.Run("RefusedLikeStock", func(t *testing.T) { testRefused(t, s, alice, bob, roomID) })
		t.Run("TooLargeToBeClosed", func(t *testing.T) { testTooLarge(t, s, alice, roomID) })
		t.Run("TokensAreOpaque", func(t *testing.T) { testTokens(t, alice, roomID) })
	})
}

func testForms(t *testing.T, alice, bob *user, roomID string) {
	room := "/rooms/" + url.PathEscape(roomID)
	for i, form := range []struct{ method, path string }{
		{http.MethodPut, room + "/send/m.room.message/form%d"},
		{http.MethodPost, room + "/send/m.room.message"},
		{http.MethodPut, room + "/state/" + memberType + "/form%d"},
		{http.MethodPut, room + "/state/" + memberType + "/"},
		{http.MethodPut, room + "/state/" + memberType},
	} {
		for j, version := range []string{"v3", "r0"} {
			path := "/_matrix/client/" + version + form.path
			if strings.Contains(path, "%d") {
				path = fmt.Sprintf(strings.ReplaceAll(path, "%21", "%%21"), 10*i+j)
			}
			t.Run(form.method+" "+version+strings.ReplaceAll(form.path, room, ""), func(t *testing.T) {
				follower := bob.follow(t, roomID)
				res := alice.must(t, form.method, path, JSON{"m.will_expire": 77123, "body": fmt.Sprint(i, j)})
				eventID := res.Get("event_id").Str
				require.Equal(t, eventID, res.Get("eventId").Str)
				require.NotEmpty(t, res.Get("expire_refresh_token").Str)
				require.Len(t, res.Get("@this").Map(), 3)

				isIt := func(e gjson.Result) bool { return e.Get("event_id").Str == eventID }
				synced := follower.await(t, "the event", isIt)
				event := bob.must(t, http.MethodGet, "/_matrix/client/v3"+room+"/event/"+url.PathEscape(eventID), nil)
				context := bob.must(t, http.MethodGet, "/_matrix/client/v3"+room+"/context/"+url.PathEscape(eventID), nil)
				messages := bob.must(t, http.MethodGet, "/_matrix/client/v3"+room+"/messages?dir=b&limit=5", nil)
				for where, seen := range map[string]gjson.Result{
					"sync": synced, "event": event.Get("@this"), "context": context.Get("event"),
					"messages": messages.Get(`chunk.#(event_id=="` + eventID + `")`),
				} {
					require.Equal(t, "running", seen.Get(`content.m\.will_expire`).Str, where)
					require.NotContains(t, seen.Raw, "77123", where)
				}
			})
		}
	}
}

func testValues(t *testing.T, alice *user, roomID string) {
	before := len(alice.timeline(t, roomID))
	for _, bad := range []string{
		"0", "-1", "1.5", "10.0", "1e1", "86401", "99999999999999999999", `"running"`, `"10"`, `""`, `"Expired"`, "true", "null",
		"[]", "[10]", "{}",
	} {
		for _, path := range []string{homeserver.SendPath(roomID, "m.room.message"), homeserver.StatePath(roomID, memberType, "bad")} {
			res := alice.do(t, http.MethodPut, path, []byte(`{"body":"x","m.will_expire":`+bad+`}`))
			require.Equal(t, http.StatusBadRequest, res.Code, "%s: %s", bad, res)
			require.Equal(t, "M_INVALID_PARAM", res.Get("errcode").Str, bad)
			require.Contains(t, res.Get("error").Str, "m.will_expire")
			require.Contains(t, res.Get("error").Str, "from 1 to 86400")
		}
	}
	require.Equal(t, before, len(alice.timeline(t, roomID)), "something was sent")
	require.False(t, alice.state(t, roomID, "bad").Exists())

	for _, good := range []string{"1", "86400"} {
		res := alice.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "good"+good),
			[]byte(`{"m.will_expire":`+good+`}`))
		require.NotEmpty(t, res.Get("expire_refresh_token").Str)
	}
	for _, own := range []string{"expired", "ended"} { // the client closes its event itself
		res := alice.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "own"), JSON{"m.will_expire": own})
		require.Len(t, res.Get("@this").Map(), 1, "no token")
		require.Equal(t, own, alice.state(t, roomID, "own").Get(`content.m\.will_expire`).Str)
	}
	// A key can be written with escapes. The duration must not get into the event that way.
	res := alice.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "escaped"), []byte(`{"m\u002ewill_expir\u0065":77}`))
	require.NotEmpty(t, res.Get("expire_refresh_token").Str)
	require.Equal(t, "running", alice.state(t, roomID, "escaped").Get(`content.m\.will_expire`).Str)
	// A field of this name in a nested object has no special meaning.
	res = alice.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "deeper"), JSON{"a": JSON{"m.will_expire": 5}})
	require.Len(t, res.Get("@this").Map(), 1)
	require.EqualValues(t, 5, alice.state(t, roomID, "deeper").Get(`content.a.m\.will_expire`).Int())
}

func testWithoutField(t *testing.T, alice *user, roomID string) {
	path := homeserver.SendPath(roomID, "m.room.message")
	res := alice.must(t, http.MethodPut, path, JSON{"msgtype": "m.text", "body": "m.will_expire"})
	require.JSONEq(t, fmt.Sprintf(`{"event_id":%q}`, res.Get("event_id").Str), string(res.Body))
	again := alice.must(t, http.MethodPut, path, JSON{"msgtype": "m.text", "body": "m.will_expire"})
	require.Equal(t, string(res.Body), string(again.Body), "a retry")
	for body, errcode := range map[string]string{
		"": "M_BAD_JSON", "{": "M_BAD_JSON", "[]": "M_BAD_JSON", "\"\xff\"": "M_NOT_JSON",
		`{"m.will_expire":1`: "M_BAD_JSON", `["m.will_expire"]`: "M_BAD_JSON", "{\"m.will_expire\":1,\"a\":\"\xff\"}": "M_NOT_JSON",
	} {
		res := alice.do(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), []byte(body))
		require.Equal(t, http.StatusBadRequest, res.Code, body)
		require.Equal(t, errcode, res.Get("errcode").Str, body)
	}
	anonymous := &user{alice.s.Anonymous(), alice.s}
	res = anonymous.do(t, http.MethodPut, path, JSON{"m.will_expire": "bad"})
	require.Equal(t, http.StatusUnauthorized, res.Code, "authentication comes first")
	require.Equal(t, "M_MISSING_TOKEN", res.Get("errcode").Str)
}

func testContent(t *testing.T, alice *user, roomID string) {
	content := `{"algorithm":"m.megolm.v1.aes-sha2","ciphertext":"AwgAEnACgAkLmt6qF84IK++J7UDH2Za1YVchHyprqTqsg",` +
		`"list":[1,-2,{"ü":null}],"html":"<b>&</b>","m.will_expire":%s}`
	path := homeserver.SendPath(roomID, "m.room.encrypted")
	res := alice.must(t, http.MethodPut, path, []byte(fmt.Sprintf(content, "60")))
	require.JSONEq(t, fmt.Sprintf(content, `"running"`), alice.event(t, roomID, res.Get("event_id").Str).Get("content").Raw)
}

func testGuests(t *testing.T, s *server, alice *user) {
	client, err := s.RegisterGuest(t.Context())
	require.NoError(t, err)
	guest := &user{client, s}
	roomID, err := alice.CreateRoom(t.Context(), JSON{"initial_state": []JSON{{
		"type": "m.room.guest_access", "state_key": "", "content": JSON{"guest_access": "can_join"},
	}}})
	require.NoError(t, err)
	require.NoError(t, guest.Join(t.Context(), roomID))
	guest.sendMessage(t, roomID, 60)
	sent := guest.sendState(t, roomID, guest.UserID, 60, nil)
	code, _ := s.keepAlive(t, "end", sent.token)
	require.Equal(t, http.StatusOK, code)
}

func testRetriedMessage(t *testing.T, s *server, alice *user, roomID string) {
	path, body := homeserver.SendPath(roomID, "m.room.message"), JSON{"m.will_expire": patience.Life(4), "body": "once"}
	follower := alice.follow(t, roomID)
	start := time.Now()
	first := sentBy(t, alice.must(t, http.MethodPut, path, body))
	later := alice.sendMessage(t, roomID, patience.Life(6))
	for half := time.Duration(patience.Life(2)) * time.Second; time.Since(start) < half; {
		require.Equal(t, first, sentBy(t, alice.must(t, http.MethodPut, path, body)))
		follower.read(t, 100*time.Millisecond)
	}
	// Events of a room are closed in the order of their deadlines. A restarted timer would change the order.
	var order []string
	follower.await(t, "both", func(e gjson.Result) bool {
		if closes := e.Get(`content.m\.relates_to.event_id`).Str; closes == first.eventID || closes == later.eventID {
			order = append(order, closes)
		}
		return len(order) == 2
	})
	require.Equal(t, []string{first.eventID, later.eventID}, order, "the retries restarted the timer")
	require.Equal(t, first, sentBy(t, alice.must(t, http.MethodPut, path, body)), "also when it is over")
	s.refused(t, first.token)
	require.Len(t, alice.closings(t, roomID, first.eventID), 1)
}

// A client that hangs up and tries again, or sends concurrently, sends one message.
func testImpatientClient(t *testing.T, alice *user, roomID string) {
	for round := range 5 {
		path, body := homeserver.SendPath(roomID, "m.room.message"), JSON{"m.will_expire": 600, "impatient": round}
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(4*i)*time.Millisecond)
				defer cancel()
				_, _ = alice.Do(ctx, http.MethodPut, path, body)
			})
		}
		sent := sentBy(t, alice.must(t, http.MethodPut, path, body))
		wg.Wait()
		require.Equal(t, sent, sentBy(t, alice.must(t, http.MethodPut, path, body)))
		var found []string
		for _, e := range alice.timeline(t, roomID) {
			if n := e.Get("content.impatient"); n.Exists() && int(n.Int()) == round {
				found = append(found, e.Get("event_id").Str)
			}
		}
		require.Equal(t, []string{sent.eventID}, found)
	}
}

func testRepeatedState(t *testing.T, s *server, alice *user, roomID string) {
	content := JSON{"call": "1"}
	first := alice.sendState(t, roomID, "repeated", patience.Life(2), content)
	require.Equal(t, first, alice.sendState(t, roomID, "repeated", 600, content), "the same event and token")
	other := alice.sendMessage(t, roomID, patience.Life(3)) // when it is closed, the first duration is long over
	alice.follow(t, roomID).awaitClosing(t, other.eventID, "expired")
	s.refreshed(t, first.token)
	// The duration becomes shorter again, and the timer follows.
	follower := alice.follow(t, roomID)
	require.Equal(t, first, alice.sendState(t, roomID, "repeated", 1, content))
	follower.awaitClosing(t, first.eventID, "expired")
	// After the event has expired, the same content starts a new event.
	second := alice.sendState(t, roomID, "repeated", 600, content)
	require.NotEqual(t, first, second)
	s.refused(t, first.token)
	s.refreshed(t, second.token)
}

func testTokenOfAnother(t *testing.T, s *server, alice, bob *user, roomID string) {
	content := JSON{"call": "mine"}
	hers := alice.sendState(t, roomID, "shared", 600, content)
	path := homeserver.StatePath(roomID, memberType, "shared")
	stranger := s.newUser(t)
	res := stranger.do(t, http.MethodPut, path, JSON{"m.will_expire": 600, "call": "mine"})
	require.Equal(t, http.StatusForbidden, res.Code, res)
	require.NotContains(t, string(res.Body), hers.token)
	s.refreshed(t, hers.token)
	his := bob.sendState(t, roomID, "shared", 600, content)
	require.NotEqual(t, hers, his, "bob may replace it, but gets an event of his own")
	s.refused(t, hers.token)
	s.refreshed(t, his.token)
}

func testRefused(t *testing.T, s *server, alice, bob *user, roomID string) {
	stranger := s.newUser(t)
	running := s.metric(t, "dendrite_expiration_running_timers")
	large := strings.Repeat("x", 70000)
	for name, test := range map[string]struct {
		sender  *user
		path    string
		content JSON
		code    int
	}{
		"not joined, message": {stranger, homeserver.SendPath(roomID, "m.room.message"), JSON{}, http.StatusForbidden},
		"not joined, state":   {stranger, homeserver.StatePath(roomID, memberType, "x"), JSON{}, http.StatusForbidden},
		"no power":            {bob, homeserver.StatePath(roomID, "m.room.name", ""), JSON{"name": "x"}, http.StatusForbidden},
		"too large":           {alice, homeserver.SendPath(roomID, "m.room.message"), JSON{"body": large}, http.StatusRequestEntityTooLarge},
		"no such room":        {alice, homeserver.SendPath("!none:localhost", "m.room.message"), JSON{}, http.StatusBadRequest},
	} {
		t.Run(name, func(t *testing.T) {
			stock := test.sender.do(t, http.MethodPut, test.path, test.content)
			require.Equal(t, test.code, stock.Code, stock)
			test.content["m.will_expire"] = 60
			ours := test.sender.do(t, http.MethodPut, test.path, test.content)
			require.Equal(t, stock.Code, ours.Code)
			require.Equal(t, stock.Get("errcode").Str, ours.Get("errcode").Str)
		})
	}
	require.Equal(t, running, s.metric(t, "dendrite_expiration_running_timers"))
}

func testTooLarge(t *testing.T, s *server, alice *user, roomID string) {
	send := func(size int) homeserver.Response {
		return alice.do(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"),
			JSON{"m.will_expire": 600, "body": strings.Repeat("<", size)}) // one byte each in an event, six in a request
	}
	// Every accepted event can be closed. Events that are slightly larger would fit into the room, but their closing events would not.
	fits, tooLarge := 60000, 65536
	for fits+1 < tooLarge {
		size := (fits + tooLarge) / 2
		if res := send(size); res.Code == http.StatusOK {
			fits = size
			code, _ := s.keepAlive(t, "end", res.Get("expire_refresh_token").Str)
			require.Equal(t, http.StatusOK, code)
		} else {
			tooLarge = size
		}
	}
	res := send(tooLarge)
	require.Equal(t, http.StatusRequestEntityTooLarge, res.Code)
	require.Equal(t, "M_TOO_LARGE", res.Get("errcode").Str)
	alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), JSON{"body": strings.Repeat("<", tooLarge)})

	res = send(fits)
	require.Equal(t, http.StatusOK, res.Code, res)
	// The closing event now gets more prev events than its original.
	alice.must(t, http.MethodPut, homeserver.StatePath(roomID, "m.room.topic", ""), JSON{"topic": "x"})
	code, errcode := s.keepAlive(t, "end", res.Get("expire_refresh_token").Str)
	require.Equal(t, http.StatusOK, code, errcode)
}

func TestTimersPerUserAreLimited(t *testing.T) {
	t.Parallel()
	expiration := JSON{"max_running_per_user": 3, "max_duration": "1h"}
	registration := bridge(t)
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			s := start(t, homeserver.Config{Postgres: db.open(t), Expiration: expiration, AppServices: []string{registration}})
			alice := s.newUser(t)
			roomID := s.room(t, alice)
			first := alice.sendState(t, roomID, "1", 30, nil)
			alice.sendState(t, roomID, "2", 60, nil)
			alice.sendMessage(t, roomID, 3600)

			path, body := homeserver.SendPath(roomID, "m.room.message"), JSON{"m.will_expire": 60}
			res := alice.do(t, http.MethodPut, path, body)
			require.Equal(t, http.StatusTooManyRequests, res.Code, res)
			require.Equal(t, "M_LIMIT_EXCEEDED", res.Get("errcode").Str)
			after := res.Get("retry_after_ms").Int()
			require.Greater(t, after, int64(1000))
			require.LessOrEqual(t, after, int64(31000), "until the first of them has run out")
			require.Equal(t, fmt.Sprint((after+999)/1000), res.Header.Get("Retry-After"))

			// Replacing an event, repeating its send, and sending a plain event need no further timer.
			alice.sendState(t, roomID, "2", 60, JSON{"new": true})
			alice.sendState(t, roomID, "1", 30, nil)
			alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), JSON{"body": "x"})
			code, _ := s.keepAlive(t, "end", first.token)
			require.Equal(t, http.StatusOK, code)
			sentBy(t, alice.must(t, http.MethodPut, path, body))

			bridge := &user{&homeserver.Client{URL: s.URL, UserID: "@bridge:localhost", Token: "as-token"}, s}
			bridgeRoom := s.room(t, bridge)
			for range 10 {
				bridge.sendMessage(t, bridgeRoom, 60)
			}
			res = alice.do(t, http.MethodPut, path+"x", JSON{"m.will_expire": 3601})
			require.Equal(t, http.StatusBadRequest, res.Code)
			require.Contains(t, res.Get("error").Str, "from 1 to 3600")
		})
	}
}
