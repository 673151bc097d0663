package integration

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// docs/protocol.md, section 2: the keep-alive endpoint.

const keepAlivePath = "/_matrix/client/v3/expiration/"

func TestKeepAlive(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, nil, func(t *testing.T, s *server) {
		alice, bob := s.newUser(t), s.newUser(t)
		roomID := s.room(t, alice, bob)
		t.Run("RefreshHolds", func(t *testing.T) { testRefreshHolds(t, s, alice, bob, roomID) })
		t.Run("EndCloses", func(t *testing.T) { testEndCloses(t, s, alice, bob, roomID) })
		t.Run("OneOfManyEndsCloses", func(t *testing.T) { testManyEnds(t, s, alice, roomID) })
		t.Run("BadRequests", func(t *testing.T) { testBadRequests(t, s, alice, roomID) })
		t.Run("OtherMethods", func(t *testing.T) { testOtherMethods(t, s) })
		t.Run("CORS", func(t *testing.T) { testCORS(t, s) })
		t.Run("EndByOneWhoLeft", func(t *testing.T) { testEndByOneWhoLeft(t, s, alice, bob, roomID) })
		t.Run("EndWithoutPower", func(t *testing.T) { testEndWithoutPower(t, s) })
	})
}

func testRefreshHolds(t *testing.T, s *server, alice, bob *user, roomID string) {
	follower := bob.follow(t, roomID)
	seconds := patience.Life(4)
	life := time.Duration(seconds) * time.Second
	sent := alice.sendState(t, roomID, "held", seconds, nil)
	start := time.Now()
	var last time.Time
	for time.Since(start) < 2*life { // the requests take long enough, no further pauses are needed
		before := time.Now()
		s.refreshed(t, sent.token)
		last = before
		follower.read(t, 200*time.Millisecond)
	}
	require.Equal(t, "running", alice.state(t, roomID, "held").Get(`content.m\.will_expire`).Str)
	closing := follower.awaitClosing(t, sent.eventID, "expired")
	require.GreaterOrEqual(t, closing.Get("origin_server_ts").Int(), last.Add(life).UnixMilli(), "early")
	s.refused(t, sent.token)
	code, errcode := s.keepAlive(t, "end", sent.token)
	require.Equal(t, http.StatusNotFound, code)
	require.Equal(t, "M_NOT_FOUND", errcode)
}

func testEndCloses(t *testing.T, s *server, alice, bob *user, roomID string) {
	sent := alice.sendState(t, roomID, "ended", 600, JSON{"foci": []string{"a"}})
	code, errcode := s.keepAlive(t, "end", sent.token)
	require.Equal(t, http.StatusOK, code, errcode)
	// A 200 means that the closing event is in the room, so the test does not wait here.
	require.Equal(t, "ended", alice.state(t, roomID, "ended").Get(`content.m\.will_expire`).Str)
	closing := bob.follow(t, roomID).awaitClosing(t, sent.eventID, "ended")
	require.Equal(t, alice.UserID, closing.Get("sender").Str)
	require.Equal(t, memberType, closing.Get("type").Str)
	require.Equal(t, "ended", closing.Get("state_key").Str)
	for _, method := range []string{"end", "refresh"} {
		code, errcode = s.keepAlive(t, method, sent.token)
		require.Equal(t, http.StatusNotFound, code)
		require.Equal(t, "M_NOT_FOUND", errcode)
	}
}

func testManyEnds(t *testing.T, s *server, alice *user, roomID string) {
	for range 5 {
		sent := alice.sendMessage(t, roomID, 1)
		<-time.After(980 * time.Millisecond) // so that the expiry also takes part in the race
		var (
			wg    sync.WaitGroup
			mu    sync.Mutex
			codes = map[int]int{}
		)
		for range 10 {
			wg.Go(func() {
				res, err := s.Anonymous().KeepAlive(t.Context(), "end", sent.token)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				codes[res.Code]++
				mu.Unlock()
			})
		}
		wg.Wait()
		eventually(t, "a closing event", func() bool { return len(alice.closings(t, roomID, sent.eventID)) > 0 })
		closings := alice.closings(t, roomID, sent.eventID)
		require.Len(t, closings, 1)
		won := 0
		if closings[0].Get(`content.m\.will_expire`).Str == "ended" {
			won = 1
		}
		require.Equal(t, won, codes[http.StatusOK], codes)
	}
}

func testBadRequests(t *testing.T, s *server, alice *user, roomID string) {
	token := alice.sendMessage(t, roomID, 600).token
	anonymous := &user{s.Anonymous(), s}
	for _, method := range []string{"refresh", "end"} {
		for body, want := range map[string]struct {
			code    int
			errcode string
		}{
			"":                                    {http.StatusBadRequest, "M_NOT_JSON"},
			"{":                                   {http.StatusBadRequest, "M_NOT_JSON"},
			"token":                               {http.StatusBadRequest, "M_NOT_JSON"},
			"{} {}":                               {http.StatusBadRequest, "M_NOT_JSON"},
			"{\"a\":\"\xff\"}":                    {http.StatusBadRequest, "M_NOT_JSON"},
			`[]`:                                  {http.StatusBadRequest, "M_BAD_JSON"},
			`null`:                                {http.StatusBadRequest, "M_BAD_JSON"},
			`"` + token + `"`:                     {http.StatusBadRequest, "M_BAD_JSON"},
			`{"expire_refresh_token":5}`:          {http.StatusBadRequest, "M_BAD_JSON"},
			`{"expire_refresh_token":null}`:       {http.StatusBadRequest, "M_BAD_JSON"},
			`{"expire_refresh_token":["x"]}`:      {http.StatusBadRequest, "M_BAD_JSON"},
			`{}`:                                  {http.StatusBadRequest, "M_MISSING_PARAM"},
			`{"token":"` + token + `"}`:           {http.StatusBadRequest, "M_MISSING_PARAM"},
			`{"expire_refresh_token":""}`:         {http.StatusNotFound, "M_NOT_FOUND"},
			`{"expire_refresh_token":"x"}`:        {http.StatusNotFound, "M_NOT_FOUND"},
			strings.Repeat(" ", 4095) + `{}`:      {http.StatusRequestEntityTooLarge, "M_TOO_LARGE"},
			`{"x":"` + strings.Repeat("x", 1<<20): {http.StatusRequestEntityTooLarge, "M_TOO_LARGE"},
		} {
			res := anonymous.do(t, http.MethodPut, keepAlivePath+method, []byte(body))
			require.Equal(t, want.code, res.Code, "%.60q: %s", body, res)
			require.Equal(t, want.errcode, res.Get("errcode").Str, "%.60q: %s", body, res)
		}
	}
	// The body has the largest allowed size. Additional fields and an access token do not matter.
	padded := `{"expire_refresh_token":"` + token + `","more":[1]}`
	padded = strings.Repeat(" ", 4096-len(padded)) + padded
	require.Equal(t, http.StatusOK, alice.do(t, http.MethodPut, keepAlivePath+"refresh", []byte(padded)).Code)
}

func testOtherMethods(t *testing.T, s *server) {
	anonymous := &user{s.Anonymous(), s}
	for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodDelete, http.MethodPatch} {
		for _, refreshMethod := range []string{"refresh", "end"} {
			res := anonymous.do(t, method, keepAlivePath+refreshMethod, nil)
			require.Equal(t, http.StatusMethodNotAllowed, res.Code, method)
			require.Equal(t, "M_UNRECOGNIZED", res.Get("errcode").Str, method)
		}
	}
	for _, refreshMethod := range []string{"", "expire", "Refresh", "refresh2", "refresh/x", "endrefresh"} {
		res := anonymous.do(t, http.MethodPut, keepAlivePath+refreshMethod, JSON{"expire_refresh_token": "x"})
		require.Equal(t, http.StatusNotFound, res.Code, refreshMethod)
		require.Equal(t, "M_UNRECOGNIZED", res.Get("errcode").Str, refreshMethod)
	}
}

func testCORS(t *testing.T, s *server) {
	anonymous := &user{s.Anonymous(), s}
	preflight := anonymous.do(t, http.MethodOptions, keepAlivePath+"refresh", nil,
		"Origin", "https://call.example", "Access-Control-Request-Method", "PUT")
	answer := anonymous.do(t, http.MethodPut, keepAlivePath+"refresh", JSON{"expire_refresh_token": "x"}, "Origin", "https://call.example")
	require.Equal(t, http.StatusOK, preflight.Code)
	for _, res := range []homeserver.Response{preflight, answer} {
		require.Equal(t, "*", res.Header.Get("Access-Control-Allow-Origin"))
		require.Contains(t, res.Header.Get("Access-Control-Allow-Methods"), "PUT")
		require.Contains(t, res.Header.Get("Access-Control-Allow-Headers"), "Content-Type")
	}
}

func testEndByOneWhoLeft(t *testing.T, s *server, alice, bob *user, roomID string) {
	for _, how := range []string{"leave", "kick", "ban"} {
		carol := s.newUser(t)
		require.NoError(t, carol.Join(t.Context(), roomID))
		state, message := carol.sendState(t, roomID, carol.UserID, 600, nil), carol.sendMessage(t, roomID, 600)
		if how == "leave" {
			carol.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+roomID+"/leave", JSON{})
		} else {
			alice.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+roomID+"/"+how, JSON{"user_id": carol.UserID})
		}
		for _, sent := range []sent{state, message} {
			code, errcode := s.keepAlive(t, "end", sent.token)
			require.Equal(t, http.StatusForbidden, code, how)
			require.Equal(t, "M_FORBIDDEN", errcode, how)
			s.refused(t, sent.token)
			code, _ = s.keepAlive(t, "end", sent.token)
			require.Equal(t, http.StatusNotFound, code, how)
			require.Empty(t, bob.closings(t, roomID, sent.eventID), how)
		}
	}
}

func testEndWithoutPower(t *testing.T, s *server) {
	alice, bob := s.newUser(t), s.newUser(t)
	roomID := s.room(t, alice, bob)
	sent := bob.sendState(t, roomID, bob.UserID, 600, nil)
	levels := alice.must(t, http.MethodGet, homeserver.StatePath(roomID, "m.room.power_levels", ""), nil)
	changed := levels.Get("@this").Value().(map[string]any)
	changed["events"].(map[string]any)[memberType] = 100
	alice.must(t, http.MethodPut, homeserver.StatePath(roomID, "m.room.power_levels", ""), changed)
	code, errcode := s.keepAlive(t, "end", sent.token)
	require.Equal(t, http.StatusForbidden, code)
	require.Equal(t, "M_FORBIDDEN", errcode)
	s.refused(t, sent.token)
	require.Empty(t, bob.closings(t, roomID, sent.eventID))
}

func TestKeepAliveIsLimited(t *testing.T) {
	t.Parallel()
	limits := JSON{
		"rate_limiting": JSON{
			"token":         JSON{"threshold": 5, "cooloff_ms": 60000},
			"unknown_token": JSON{"threshold": 3, "cooloff_ms": 60000},
		},
	}
	onEachDatabase(t, limits, func(t *testing.T, s *server) {
		alice := s.newUser(t)
		roomID := s.room(t, alice)
		anonymous := &user{s.Anonymous(), s}
		limited := func(token string) {
			t.Helper()
			res := anonymous.do(t, http.MethodPut, keepAlivePath+"refresh", JSON{"expire_refresh_token": token},
				"X-Forwarded-For", token, "X-Real-IP", token)
			require.Equal(t, http.StatusTooManyRequests, res.Code)
			require.Equal(t, "M_LIMIT_EXCEEDED", res.Get("errcode").Str)
			require.Greater(t, res.Get("retry_after_ms").Int(), int64(0))
			require.NotEmpty(t, res.Header.Get("Retry-After"))
		}
		hammered, other := alice.sendMessage(t, roomID, 600), alice.sendMessage(t, roomID, 600)
		for range 5 {
			s.refreshed(t, hammered.token)
		}
		limited(hammered.token)
		for range 3 {
			s.refused(t, "guess")
		}
		limited("10.0.0.1")
		limited("10.0.0.2")
		// Valid tokens are not affected by the limits of other requests, not even from the same address.
		s.refreshed(t, other.token)
		code, _ := s.keepAlive(t, "end", other.token)
		require.Equal(t, http.StatusOK, code)
	})
}

// Sending state takes a lock. A slow client must not hold it, least of all one that is not even in the room.
func TestSlowStateHoldsUpNobody(t *testing.T) {
	t.Parallel()
	s := start(t, homeserver.Config{})
	alice, stranger := s.newUser(t), s.newUser(t)
	roomID := s.room(t, alice)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	started := make(chan struct{})
	body := &endless{ctx: ctx, started: started}
	wg.Go(func() {
		_, _ = stranger.Do(ctx, http.MethodPut, homeserver.StatePath(roomID, memberType, "key"), body)
	})
	<-started
	// The server has the request's first byte when it answers a later request.
	alice.must(t, http.MethodGet, "/_matrix/client/versions", nil)
	sent := alice.sendState(t, roomID, "key", 1, nil)
	alice.follow(t, roomID).awaitClosing(t, sent.eventID, "expired")
}

// endless is a body with one byte, followed by nothing.
type endless struct {
	ctx     context.Context
	sent    bool
	started chan struct{} // closed when a second byte is requested; may be nil
}

func (e *endless) Read(p []byte) (int, error) {
	if !e.sent {
		e.sent = true
		p[0] = '{'
		return 1, nil
	}
	if e.started != nil {
		close(e.started)
		e.started = nil
	}
	<-e.ctx.Done()
	return 0, e.ctx.Err()
}
