package rtc

import (
	"bytes"
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

var (
	aliceOpenID = JSON{"access_token": "openid-alice", "token_type": "Bearer", "matrix_server_name": "a.example", "expires_in": 3600}
	carolOpenID = JSON{"access_token": "openid-carol", "matrix_server_name": "b.example"}
	sfuGetBody  = JSON{"room": roomID, "device_id": "DEV", "openid_token": aliceOpenID}
	serviceBody = JSON{
		"room_id": roomID, "slot_id": slotID, "openid_token": aliceOpenID,
		"member": JSON{"id": "abc", "claimed_user_id": "@alice:a.example", "claimed_device_id": "DEV"},
	}
	carolService = with(serviceBody, JSON{
		"openid_token": carolOpenID, "member": JSON{"id": "abc", "claimed_user_id": "@carol:b.example", "claimed_device_id": "DEV"},
	})
	delay = JSON{"delay_id": "delay", "delay_timeout": 3_600_000, "delay_cs_api_url": "https://a.example"}
)

func (w *world) askService(path string, body any) answer {
	return w.ask(strings.TrimPrefix(servicePath, "/_matrix/client")+path, "", body)
}

// askWith is ask with a context.
func (w *world) askWith(ctx context.Context, path, user string, body any) answer {
	req := httptest.NewRequest(http.MethodPost, "/_matrix/client"+path, bytes.NewReader(encode(w.t, body))).WithContext(ctx)
	req.Header.Set("Authorization", "Bearer "+user)
	return w.serve(w.routers.Client, req)
}

// carolIsKnown makes b.example answer for carol's OpenID token.
func (w *world) carolIsKnown() {
	w.servers.answer = func(req *http.Request, _ gjson.Result) (int, string) {
		if req.URL.Query().Get("access_token") != "openid-carol" || req.URL.Path != "/_matrix/federation/v1/openid/userinfo" {
			return http.StatusUnauthorized, `{"errcode":"M_UNKNOWN_TOKEN"}`
		}
		return http.StatusOK, `{"sub":"@carol:b.example"}`
	}
}

// A local user gets a token with an OpenID token, and no other server is asked. The two paths have identities of their own.
func TestService(t *testing.T) {
	for path, test := range map[string]struct {
		body     JSON
		identity string
	}{
		"/sfu/get":   {sfuGetBody, "@alice:a.example:DEV"},
		"/get_token": {serviceBody, livekit.Identity("@alice:a.example", "DEV", "abc")},
	} {
		w := newWorld(t, nil)
		a := w.askService(path, with(test.body, JSON{"unknown": JSON{}}))
		require.Equal(t, http.StatusOK, a.Code, a.Body)
		require.JSONEq(t, `{"url":"`+sfuURL+`","jwt":"`+tokenFor(true, roomID, test.identity)+`"}`, a.Body.String())
		require.Equal(t, "@alice:a.example", w.keeper.remembered[0].UserID)
		require.Empty(t, w.servers.asked)
		require.Empty(t, w.keeper.leaves)
	}
}

// A user of another server can listen in a room that is there. With full access, the room is made, and the user can publish.
func TestServiceForAnotherServer(t *testing.T) {
	identity := livekit.Identity("@carol:b.example", "DEV", "abc")
	w := newWorld(t, (*world).carolIsKnown)
	refused(t, w.askService("/get_token", carolService), http.StatusForbidden, "M_FORBIDDEN")
	require.Empty(t, w.sfu.rooms)
	w.askService("/get_token", serviceBody)
	require.Equal(t, tokenFor(false, roomID, identity), w.askService("/get_token", carolService).Get("jwt").Str)
	sfuGet := with(sfuGetBody, JSON{"openid_token": carolOpenID})
	require.Equal(t, tokenFor(false, roomID, "@carol:b.example:DEV"), w.askService("/sfu/get", sfuGet).Get("jwt").Str)

	w = newWorld(t, func(w *world) { w.carolIsKnown(); w.cfg.FullAccessServers = []string{"b.example"} })
	require.Equal(t, tokenFor(true, roomID, identity), w.askService("/get_token", carolService).Get("jwt").Str)
}

// A leave event is handed over together with the token, or alone.
func TestLeaveIsHandedOver(t *testing.T) {
	for path, test := range map[string]struct {
		body     JSON
		id       string
		identity string
	}{
		"/sfu/get":                {sfuGetBody, "@alice:a.example:DEV", "@alice:a.example:DEV"},
		"/get_token":              {serviceBody, "abc", livekit.Identity("@alice:a.example", "DEV", "abc")},
		"/delegate_delayed_leave": {serviceBody, "abc", livekit.Identity("@alice:a.example", "DEV", "abc")},
	} {
		w := newWorld(t, nil)
		a := w.askService(path, with(test.body, delay))
		require.Equal(t, http.StatusOK, a.Code, a.Body)
		if path == "/delegate_delayed_leave" {
			require.JSONEq(t, `{}`, a.Body.String())
			require.Empty(t, w.keeper.remembered)
		} else {
			require.Equal(t, tokenFor(true, roomID, test.identity), a.Get("jwt").Str)
		}
		require.Equal(t, []Leave{{
			UserID: "@alice:a.example", RoomID: roomID, DelayID: "delay",
			MemberKey:   member{userID: "@alice:a.example", roomID: roomID, slotID: slotID, id: test.id}.key(),
			Participant: livekit.Participant{Room: livekit.RoomName(roomID, slotID), Identity: test.identity},
		}}, w.keeper.leaves)
	}
}

func TestServiceErrors(t *testing.T) {
	for name, test := range map[string]struct {
		path, body string
		base       JSON
		changes    JSON
		status     int
		errcode    string
	}{
		"NotJSON":         {"/sfu/get", `{`, nil, nil, http.StatusBadRequest, "M_NOT_JSON"},
		"Empty":           {"/delegate_delayed_leave", ` `, nil, nil, http.StatusBadRequest, "M_NOT_JSON"},
		"NoObject":        {"/get_token", `5`, nil, nil, http.StatusBadRequest, "M_BAD_JSON"},
		"NoRoom":          {"/sfu/get", "", sfuGetBody, JSON{"room": nil}, http.StatusBadRequest, "M_BAD_JSON"},
		"NoDevice":        {"/sfu/get", "", sfuGetBody, JSON{"device_id": nil}, http.StatusBadRequest, "M_BAD_JSON"},
		"NoOpenID":        {"/sfu/get", "", sfuGetBody, JSON{"openid_token": nil}, http.StatusBadRequest, "M_BAD_JSON"},
		"NoServerName":    {"/sfu/get", "", sfuGetBody, JSON{"openid_token": JSON{"access_token": "x"}}, http.StatusBadRequest, "M_BAD_JSON"},
		"RoomIsNumber":    {"/sfu/get", "", sfuGetBody, JSON{"room": 5}, http.StatusBadRequest, "M_BAD_JSON"},
		"LongDevice":      {"/sfu/get", "", sfuGetBody, JSON{"device_id": strings.Repeat("x", 256)}, http.StatusBadRequest, "M_BAD_JSON"},
		"AnothersDevice":  {"/sfu/get", "", sfuGetBody, JSON{"device_id": "8448:DEV"}, http.StatusBadRequest, "M_BAD_JSON"},
		"NoSlot":          {"/get_token", "", serviceBody, JSON{"slot_id": nil}, http.StatusBadRequest, "M_BAD_JSON"},
		"NoMember":        {"/get_token", "", serviceBody, JSON{"member": nil}, http.StatusBadRequest, "M_BAD_JSON"},
		"NoClaimedUser":   {"/get_token", "", serviceBody, JSON{"member": JSON{"id": "a", "claimed_device_id": "D"}}, http.StatusBadRequest, "M_BAD_JSON"},
		"DelayIDAlone":    {"/get_token", "", serviceBody, JSON{"delay_id": "x"}, http.StatusBadRequest, "M_BAD_JSON"},
		"DelayAlone":      {"/sfu/get", "", sfuGetBody, JSON{"delay_timeout": 5}, http.StatusBadRequest, "M_BAD_JSON"},
		"DelayIsText":     {"/sfu/get", "", sfuGetBody, JSON{"delay_id": "x", "delay_timeout": "5"}, http.StatusBadRequest, "M_BAD_JSON"},
		"NoDelay":         {"/delegate_delayed_leave", "", serviceBody, nil, http.StatusBadRequest, "M_BAD_JSON"},
		"WrongToken":      {"/sfu/get", "", sfuGetBody, JSON{"openid_token": with(aliceOpenID, JSON{"access_token": "x"})}, http.StatusUnauthorized, "M_UNAUTHORIZED"},
		"AnothersToken":   {"/get_token", "", serviceBody, JSON{"member": JSON{"id": "a", "claimed_user_id": "@bob:a.example", "claimed_device_id": "D"}}, http.StatusUnauthorized, "M_UNAUTHORIZED"},
		"ServerNotThere":  {"/sfu/get", "", sfuGetBody, JSON{"openid_token": JSON{"access_token": "x", "matrix_server_name": "d.example"}}, http.StatusUnauthorized, "M_UNAUTHORIZED"},
		"NotJoined":       {"/sfu/get", "", sfuGetBody, JSON{"openid_token": with(aliceOpenID, JSON{"access_token": "openid-erin"})}, http.StatusForbidden, "M_FORBIDDEN"},
		"UnknownRoom":     {"/sfu/get", "", sfuGetBody, JSON{"room": "!unknown:a.example"}, http.StatusForbidden, "M_FORBIDDEN"},
		"RemoteDelay":     {"/get_token", "", carolService, delay, http.StatusBadRequest, "M_BAD_JSON"},
		"RemoteDelaySFU":  {"/sfu/get", "", with(sfuGetBody, JSON{"openid_token": carolOpenID}), delay, http.StatusBadRequest, "M_BAD_JSON"},
		"RemoteDelegates": {"/delegate_delayed_leave", "", carolService, delay, http.StatusForbidden, "M_FORBIDDEN"},
		"BannedByACL":     {"/get_token", "", carolService, JSON{"room_id": "!acl:a.example"}, http.StatusForbidden, "M_FORBIDDEN"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, (*world).carolIsKnown)
			var body any = test.body
			if test.base != nil {
				body = with(test.base, test.changes)
			}
			refused(t, w.askService(test.path, body), test.status, test.errcode)
			require.Empty(t, w.sfu.rooms)
			require.Empty(t, w.keeper.remembered)
			require.Empty(t, w.keeper.leaves)
		})
	}
}

func TestServiceFaults(t *testing.T) {
	for name, test := range map[string]struct {
		change  func(*world)
		body    JSON
		status  int
		errcode string
	}{
		"LiveKitAway":       {func(w *world) { w.sfu.err = errAway }, serviceBody, http.StatusInternalServerError, "M_UNKNOWN"},
		"LiveKitAwayRemote": {func(w *world) { w.sfu.err = errAway }, carolService, http.StatusInternalServerError, "M_UNKNOWN"},
		"AccountsAway":      {func(w *world) { w.users.err = errAway }, serviceBody, http.StatusInternalServerError, "M_UNKNOWN"},
		"RoomserverAway":    {func(w *world) { w.rooms.err = errAway }, carolService, http.StatusInternalServerError, "M_UNKNOWN"},
		"Expired":           {func(w *world) { w.users.expired = true }, serviceBody, http.StatusUnauthorized, "M_UNAUTHORIZED"},
		"NotScheduled":      {func(w *world) { w.keeper.err = ErrNotScheduled; w.parts.Participants = nil }, with(serviceBody, delay), http.StatusBadRequest, "M_BAD_JSON"},
		"TimersAway":        {func(w *world) { w.keeper.err = errAway; w.parts.Participants = nil }, with(serviceBody, delay), http.StatusInternalServerError, "M_UNKNOWN"},
		"NobodyTakesLeaves": {func(w *world) { w.parts.Delegations = nil }, with(serviceBody, delay), http.StatusInternalServerError, "M_UNKNOWN"},
		"OtherServerAway":   {func(w *world) { w.servers.answer = nil }, carolService, http.StatusUnauthorized, "M_UNAUTHORIZED"},
		"AnotherServers": {func(w *world) {
			w.servers.answer = func(*http.Request, gjson.Result) (int, string) { return http.StatusOK, `{"sub":"@alice:a.example"}` }
		}, with(sfuGetBody, JSON{"openid_token": carolOpenID}), http.StatusUnauthorized, "M_UNAUTHORIZED"},
		"Nonsense": {func(w *world) {
			w.servers.answer = func(*http.Request, gjson.Result) (int, string) { return http.StatusOK, `{"sub":5}` }
		}, carolService, http.StatusUnauthorized, "M_UNAUTHORIZED"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(w *world) { w.carolIsKnown(); test.change(w) })
			path := "/get_token"
			if test.body["room"] != nil {
				path = "/sfu/get"
			}
			refused(t, w.askService(path, test.body), test.status, test.errcode)
		})
	}
}

// A server that is not in the room is not asked who its user is. The answer is the same as to a wrong token of one that is.
func TestStrangersAreNotAskedForUsers(t *testing.T) {
	w := newWorld(t, (*world).carolIsKnown)
	wrong := w.askService("/sfu/get", with(sfuGetBody, JSON{"openid_token": with(carolOpenID, JSON{"access_token": "wrong"})}))
	require.Len(t, w.servers.asked, 1)
	for room, server := range map[string]string{roomID: "d.example", "!alone:a.example": "b.example", "!unknown:a.example": "b.example", "room": "b.example"} {
		body := with(sfuGetBody, JSON{"room": room, "openid_token": with(carolOpenID, JSON{"matrix_server_name": server})})
		require.Equal(t, wrong.Body.String(), w.askService("/sfu/get", body).Body.String())
	}
	require.Len(t, w.servers.asked, 1)
}

// A server in the room that does not answer costs ten seconds.
func TestOpenIDOfAServerThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(w *world) { w.servers.answer = hang })
		began := time.Now()
		refused(t, w.askService("/get_token", carolService), http.StatusUnauthorized, "M_UNAUTHORIZED")
		require.Equal(t, remoteTimeout, time.Since(began))
	})
}

// A request that fails because the server stops is told so.
func TestServiceWhileStopping(t *testing.T) {
	w := newWorld(t, func(w *world) { w.sfu.err = errAway })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a := w.askWith(ctx, strings.TrimPrefix(servicePath, "/_matrix/client")+"/get_token", "", serviceBody)
	refused(t, a, http.StatusServiceUnavailable, "M_UNKNOWN")
}

// Element Call takes any answer but 404 for a promise, so the path is only there if leave events can be handed over.
func TestDelegateIsThereOnlyIfItWorks(t *testing.T) {
	require.Equal(t, http.StatusBadRequest, newWorld(t, nil).askService("/delegate_delayed_leave", "").Code)
	w := newWorld(t, func(w *world) { w.parts.Delegations = nil })
	refused(t, w.askService("/delegate_delayed_leave", with(serviceBody, delay)), http.StatusNotFound, "M_UNRECOGNIZED")
}

// Browsers can use the service from other sites. Other methods are refused.
func TestServiceMethods(t *testing.T) {
	w := newWorld(t, nil)
	for _, path := range []string{"/sfu/get", "/get_token", "/delegate_delayed_leave", "/sfu_webhook", "/healthz"} {
		for method, status := range map[string]int{"OPTIONS": http.StatusOK, "PUT": http.StatusMethodNotAllowed, "GET": http.StatusMethodNotAllowed} {
			a := w.serve(w.routers.Client, httptest.NewRequest(method, servicePath+path, nil))
			if path == "/healthz" && method == "GET" {
				status = http.StatusOK
			}
			require.Equal(t, status, a.Code, "%s %s", method, path)
			require.Equal(t, "*", a.Header().Get("Access-Control-Allow-Origin"))
		}
	}
	require.Equal(t, http.StatusOK, w.serve(w.routers.Client, httptest.NewRequest("HEAD", servicePath+"/healthz", nil)).Code)
}

// A webhook of our LiveKit is a hint. Every webhook is answered with 200, because LiveKit would repeat it.
func TestWebhooks(t *testing.T) {
	w := newWorld(t, nil)
	send := func(w *world, authorization, body string) {
		req := httptest.NewRequest(http.MethodPost, servicePath+"/sfu_webhook", strings.NewReader(body))
		req.Header.Set("Authorization", authorization)
		require.Equal(t, http.StatusOK, w.serve(w.routers.Client, req).Code)
	}
	large := strings.Repeat("x", maxWebhook)
	send(w, "signed", large)
	send(w, "signed", large+"x")
	send(w, "forged", "forged")
	send(w, "", "")
	require.Equal(t, []livekit.Event{{SID: large}}, w.keeper.hints)
	send(newWorld(t, func(w *world) { w.parts.Hints = nil }), "signed", "x")
}
