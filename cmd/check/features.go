package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// feature is one thing that Element Call asks of a homeserver.
type feature struct {
	name string
	// needed is true if calls do not work, or do not work as people expect, without the feature. The other features serve rarer clients, or
	// comfort.
	needed bool
	// needs is what the check cannot do without.
	needs needs
	// try returns a note on what it found, or an error that says what is missing.
	try    func(context.Context, *session) (seen string, err error)
	advice string
}

// needs is what a check cannot do without. Each of them includes those before it, except that a transport needs no leave.
type needs int

const (
	nothing needs = iota
	clientAPI
	anAccount
	aRoom
	aLeave
	aTransport
	anSFUToken
)

// has returns nil if the session has what a check needs, and otherwise the first cause of the lack.
func (s *session) has(needs needs) error {
	switch {
	case needs >= clientAPI && !s.versions.Exists():
		return unknownError("no client API")
	case needs >= anAccount && s.user == nil:
		return cmp.Or(s.noAccount, "no account")
	case needs >= aRoom && s.roomID == "":
		return unknownError("no room")
	case needs == aLeave && s.leaveID == "":
		return unknownError("no delayed leave")
	case needs >= aTransport && !s.transport.Exists():
		return unknownError("no transport")
	case needs >= anSFUToken && !s.sfu.Exists():
		return unknownError("no token for LiveKit")
	}
	return nil
}

const (
	adviceDelayed = "A homeserver with delayed events (MSC4140), and those not switched off: without them people who crash stay in the call."
	adviceProxy   = "If the server is one that has it: let the reverse proxy hand on everything below /_matrix, and answer nothing itself."
	adviceRTC     = "Name the LiveKit service in the section matrix_rtc of dendrite.yaml: docs/configuration.md."
	adviceToken   = "A homeserver on which restarting and sending need no access token: the SFU's helper has none, and nobody else acts for who has crashed."
)

// features are the checks, in the order in which they run. Later checks use what earlier ones created.
var features = []feature{
	{"client API", true, nothing, tryVersions, "Look at the URL, at whether the server runs, and at the reverse proxy in front of it."},
	{"/versions: org.matrix.msc4140", true, clientAPI, advertised("org.matrix.msc4140"), adviceDelayed},
	{"/versions: org.matrix.msc4140.stable", false, clientAPI, advertised("org.matrix.msc4140.stable"), "Nothing: no client of today needs it."},
	{"/versions: org.matrix.msc4222", true, clientAPI, advertised("org.matrix.msc4222"), "A homeserver with state_after in /sync (MSC4222)."},
	{"/versions: org.matrix.msc4143", false, clientAPI, advertised("org.matrix.msc4143"), adviceRTC},
	{"well-known: where the server is", false, nothing, tryWellKnown, "Set global.well_known_client_name in dendrite.yaml, or serve the file from the domain of the server name: without it people have to enter the server's URL."},
	{"well-known: where calls go", false, nothing, tryFoci, "As for the transports; a file that another server serves needs org.matrix.msc4143.rtc_foci too. Older clients look only there."},

	{"an account", true, clientAPI, tryAccount, "Look at user name, password, token or secret."},
	{"/capabilities: limits of delayed events", false, anAccount, tryCapabilities, "Nothing: clients find out when they schedule."},
	{"transports: asked for", false, anAccount, tryTransports, adviceRTC + " Newer clients ask for them here first."},
	{"transports: there or in the well-known file", true, nothing, tryAnyTransport, adviceRTC},

	{"a room", true, anAccount, tryRoom, "Look at the server's log."},
	{"/sync: state_after", true, aRoom, tryStateAfter, "A homeserver with state_after in /sync (MSC4222): without it clients may show wrong participants. " + adviceProxy},
	{"delayed leave: scheduled", true, aRoom, trySchedule, adviceDelayed + " " + adviceProxy},
	{"delayed leave: stays when its owner joins", true, aLeave, tryJoin, "A homeserver on which only the state of others cancels a delayed event."},
	{"delayed leave: restarted, without a token", true, aLeave, tryRestart, adviceToken},
	{"delayed leave: ten restarts at once", false, aLeave, tryBurst, "Raise the limits for it (here expiration.rate_limiting.token), and see that the proxy has none for all clients together."},
	{"delayed leave: looked up", false, aLeave, tryLookUp, "Nothing: no client of today needs it."},
	{"delayed leave: sent, without a token", true, aLeave, trySend, adviceToken},
	{"delayed leave: 404 afterwards", true, aLeave, tryAfterwards, "A homeserver that answers with 404: only then do clients join again."},
	{"delayed leave: sent by itself when due", true, aLeave, tryDue, "Look at the server's log, and at its clock."},
	{"delayed leave: cancelled", false, aLeave, tryCancel, "Nothing: clients of today only tidy up with it."},
	{"delayed leave: due in an hour", true, aLeave, tryAnHour, "Raise the longest delay (here expiration.delayed_events.max_delay) to an hour: that is what clients ask for if the SFU's helper restarts."},
	{"delayed events on the stable paths", false, aLeave, tryStable, "Nothing: no client of today needs them."},
	{"room summary", true, aRoom, trySummary, "A homeserver with room summaries (MSC3266): without them nobody joins by a link. " + adviceProxy},
	{"to-device message", true, aRoom, tryToDevice, "Look at the server's log: encrypted calls get their keys this way."},
	{"OpenID token", true, anAccount, tryOpenID, "Look at the server's log: the LiveKit service gets to know people this way."},
	{"LiveKit service", true, aTransport, trySFU, "Look at whether it runs behind this URL. If this server makes the tokens itself (matrix_rtc.livekit), its log says what is wrong. Another service has a log too: it must reach LiveKit, and the homeserver's federation API to look the OpenID token up (global.disable_federation must be false)."},
	{"LiveKit: as the homeserver sees it", false, aTransport, tryHealth, "Look at the homeserver's log, and at docs/operations.md, \"Health\"."},
	{"LiveKit: URLs that browsers may call", true, aTransport, tryURLs, "Give LiveKit and the service TLS, by the reverse proxy for example, and name wss:// and https:// URLs: matrix_rtc.livekit.url and service_url in dendrite.yaml; or the service's LIVEKIT_URL, and livekit_service_url."},
	{"LiveKit: takes the token", true, anSFUToken, tryLiveKit, "No answer: look at LiveKit, the proxy in front of it, and the name in the DNS. 401: key and secret must be those of livekit.yaml, and the clocks must not differ by a minute. 404: the proxy must take the path of the URL away. WebSockets: it must hand on the headers Upgrade and Connection."},
	{"delayed leave: taken by the service", false, aTransport, tryTakes, "Nothing: clients restart their leaves themselves. With matrix_rtc.livekit this server takes them, and newer versions of lk-jwt-service do."},
	{"delayed leave: promised only if taken", true, aTransport, tryPromise, "Let the homeserver and its proxy answer 404 at " + homeRTC + delegatePath + ", or run a service that takes leaves. Element Call believes the promise: it schedules its leave an hour ahead, and people who crash stay in the call for so long."},
	{"delayed leave: sent after it is handed over", true, anSFUToken, tryHandOver, "Look at the log of the service: as it says that it takes leaves, clients schedule theirs an hour ahead and rely on it. If it cannot, let it answer 404 at " + delegatePath + "."},
	{"LiveKit: tokens from the homeserver itself", true, anSFUToken, tryHomeToken, "The transports have a url, so newer clients ask the homeserver for tokens and nobody else. " + adviceProxy},
	{"expiring event: sent, refreshed, ended", false, aRoom, tryExpiring, "Nothing: only clients of the 2024 draft of MSC4140 need it."},
	{"browsers may ask all of that", true, nothing, tryBrowsers, "Let the reverse proxy hand on OPTIONS requests and the Access-Control headers of the answers, and add none of its own."},
}

func tryVersions(ctx context.Context, s *session) (string, error) {
	// The file says where the API is. Its other contents are checked later.
	if res, err := s.ask(ctx, s.anybody(), http.MethodGet, "/.well-known/matrix/client", nil); err == nil {
		s.wellKnown = res.Get("@this")
		if base := s.wellKnown.Get(`m\.homeserver.base_url`).Str; base != "" {
			s.base = strings.TrimSuffix(base, "/")
		}
	}
	res, err := s.ask(ctx, s.anybody(), http.MethodGet, "/_matrix/client/versions", nil)
	if err != nil {
		return "", err
	}
	s.versions = res.Get("@this")
	spoken := s.versions.Get("versions").Array()
	if len(spoken) == 0 {
		return "", errors.New("the answer has no versions")
	}
	return s.base + ", Matrix " + spoken[len(spoken)-1].Str, nil
}

func advertised(flag string) func(context.Context, *session) (string, error) {
	return func(_ context.Context, s *session) (string, error) {
		if !s.versions.Get("unstable_features").Get(gjson.Escape(flag)).Bool() {
			return "", errors.New("not advertised")
		}
		return "", nil
	}
}

func tryWellKnown(_ context.Context, s *session) (string, error) {
	base := s.wellKnown.Get(`m\.homeserver.base_url`).Str
	if base == "" {
		return "", errors.New("none at " + s.server)
	}
	return base, nil
}

func tryAccount(ctx context.Context, s *session) (string, error) {
	userID, err := s.enter(ctx)
	errors.As(err, &s.noAccount)
	return userID, err
}

func tryCapabilities(ctx context.Context, s *session) (string, error) {
	res, err := s.ask(ctx, s.user, http.MethodGet, "/_matrix/client/v3/capabilities", nil)
	if err != nil {
		return "", err
	}
	limits := res.Get(`capabilities.org\.matrix\.msc4140\.delayed_events`)
	if !limits.Exists() {
		return "", errors.New("not told")
	}
	longest := time.Duration(limits.Get("max_delay_ms").Int()) * time.Millisecond
	return fmt.Sprintf("%d of each user, up to %v", limits.Get("max_scheduled").Int(), longest), nil
}

func tryRoom(ctx context.Context, s *session) (string, error) {
	if _, err := s.sync(ctx, 0); err != nil {
		return "", err
	}
	res, err := s.ask(ctx, s.user, http.MethodPost, "/_matrix/client/v3/createRoom",
		homeserver.JSON{"preset": "private_chat", "name": "Check for Element Call"})
	if err != nil {
		return "", err
	}
	s.roomID = res.Get("room_id").Str
	room := "/_matrix/client/v3/rooms/" + url.PathEscape(s.roomID)
	s.undo("the room "+s.roomID, func(ctx context.Context) error {
		for _, step := range []string{"/leave", "/forget"} {
			if _, err := s.ask(ctx, s.user, http.MethodPost, room+step, homeserver.JSON{}); err != nil {
				return err
			}
		}
		return nil
	})
	return s.roomID, nil
}

func tryStateAfter(ctx context.Context, s *session) (string, error) {
	const here = `{"application":"m.call","call_id":""}`
	if err := s.setMember(ctx, here); err != nil {
		return "", err
	}
	told := false
	err := s.await(ctx, func(res homeserver.Response) (come bool) {
		for _, field := range []string{"state_after", `org\.matrix\.msc4222\.state_after`} {
			told = told || contains(s.inRoom(res, field+".events"), "type", memberType)
		}
		return contains(s.inRoom(res, "timeline.events"), "type", memberType)
	})
	if err == nil && !told {
		err = errors.New("the state is not told")
	}
	return "", err
}

// contains reports whether one of the events has this value at a path.
func contains(events gjson.Result, path, value string) bool {
	return slices.ContainsFunc(events.Array(), func(event gjson.Result) bool { return event.Get(path).Str == value })
}

// schedule schedules the leave event. Leaving the room cleans it up, because the server then refuses the event.
func (s *session) schedule(ctx context.Context, delay time.Duration) (delayID string, err error) {
	res, err := s.ask(ctx, s.user, http.MethodPut,
		fmt.Sprintf("%s?org.matrix.msc4140.delay=%d", s.memberPath(), delay.Milliseconds()), homeserver.JSON{})
	if err != nil {
		return "", err
	}
	delayID = res.Get("delay_id").Str
	switch {
	case res.Get("event_id").Exists():
		return "", errors.New("the event was sent at once")
	case delayID == "":
		return "", errors.New("the answer has no delay_id")
	}
	s.undo("a delayed event", func(ctx context.Context) error {
		// The event may have been sent long ago, so any answer will do.
		_, err := s.anybody().Do(ctx, http.MethodPost, managePath(delayID, "cancel"), homeserver.JSON{})
		return plain(err)
	})
	return delayID, nil
}

func managePath(delayID, action string) string {
	return "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/" + url.PathEscape(delayID) + "/" + action
}

// manage acts on a delayed event without an access token, as an SFU's helper does.
func (s *session) manage(ctx context.Context, delayID, action string) (homeserver.Response, error) {
	return s.ask(ctx, s.anybody(), http.MethodPost, managePath(delayID, action), homeserver.JSON{})
}

func trySchedule(ctx context.Context, s *session) (_ string, err error) {
	s.leaveID, err = s.schedule(ctx, 18*time.Second) // the longest delay that Element Call asks for itself
	return "", err
}

func tryJoin(ctx context.Context, s *session) (string, error) {
	if err := s.setMember(ctx, `{"application":"m.call","call_id":"","scope":"m.room"}`); err != nil {
		return "", err
	}
	// The request carries an access token, as the client's does.
	_, err := s.ask(ctx, s.user, http.MethodPost, managePath(s.leaveID, "restart"), homeserver.JSON{})
	return "", err
}

func tryRestart(ctx context.Context, s *session) (string, error) {
	_, err := s.manage(ctx, s.leaveID, "restart")
	return "", err
}

func tryBurst(ctx context.Context, s *session) (string, error) {
	for i := range 10 {
		res, err := s.anybody().Do(ctx, http.MethodPost, managePath(s.leaveID, "restart"), homeserver.JSON{})
		if err != nil {
			return "", plain(err)
		}
		if res.Code != http.StatusOK {
			return "", fmt.Errorf("%s at number %d", said(res), i+1)
		}
	}
	return "", nil
}

func tryLookUp(ctx context.Context, s *session) (string, error) {
	res, err := s.ask(ctx, s.user, http.MethodGet, "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/"+url.PathEscape(s.leaveID), nil)
	switch {
	case err != nil:
		return "", err
	case res.Get("delay_id").Str != s.leaveID:
		return "", errors.New("the answer is about another event")
	case !res.Get("delayed_since_ts").Exists():
		return "", errors.New("the answer has no delayed_since_ts, as MSC4140 was merged")
	}
	return "", nil
}

func trySend(ctx context.Context, s *session) (string, error) {
	_, err := s.manage(ctx, s.leaveID, "send")
	if err == nil {
		err = s.awaitMember(ctx, "{}")
	}
	return "", err
}

func tryAfterwards(ctx context.Context, s *session) (string, error) {
	switch res, err := s.manage(ctx, s.leaveID, "restart"); {
	case err == nil:
		return "", errors.New("it can be restarted, after it was sent")
	case res.Code != http.StatusNotFound:
		return "", err
	}
	return "", nil
}

func tryDue(ctx context.Context, s *session) (string, error) {
	const delay = time.Second
	if err := s.setMember(ctx, `{"application":"m.call","call_id":"","scope":"m.user"}`); err != nil {
		return "", err
	}
	began := time.Now()
	if _, err := s.schedule(ctx, delay); err != nil {
		return "", err
	}
	if err := s.awaitMember(ctx, "{}"); err != nil {
		return "", err
	}
	return fmt.Sprintf("%v after it was due", (time.Since(began) - delay).Round(10*time.Millisecond)), nil
}

func tryCancel(ctx context.Context, s *session) (string, error) {
	delayID, err := s.schedule(ctx, 18*time.Second)
	if err == nil {
		_, err = s.manage(ctx, delayID, "cancel")
	}
	return "", err
}

func tryAnHour(ctx context.Context, s *session) (string, error) {
	_, err := s.schedule(ctx, time.Hour)
	return "", err
}

func tryStable(ctx context.Context, s *session) (string, error) {
	const v1 = "/_matrix/client/v1/delayed_events/"
	res, err := s.ask(ctx, s.user, http.MethodPut,
		"/_matrix/client/v3/rooms/"+url.PathEscape(s.roomID)+"/delayed_event/"+memberType+"/check", homeserver.JSON{
			"delay_ms": (18 * time.Second).Milliseconds(), "state_key": "_" + s.user.UserID, "content": homeserver.JSON{},
		})
	if err != nil {
		return "", err
	}
	delayID := url.PathEscape(res.Get("delay_id").Str)
	if _, err = s.ask(ctx, s.user, http.MethodPost, v1+delayID+"/cancel", homeserver.JSON{}); err != nil {
		return "", err
	}
	if res, err = s.ask(ctx, s.user, http.MethodGet, v1+delayID, nil); err == nil && !res.Get("finalised.finalised_ts").Exists() {
		err = errors.New("a cancelled event is not shown as finalised")
	}
	return "", err
}

func trySummary(ctx context.Context, s *session) (string, error) {
	// Clients use the second path until a server announces Matrix 1.15.
	var err error
	for _, path := range []string{"v1/room_summary/", "unstable/im.nheko.summary/summary/"} {
		var res homeserver.Response
		res, err = s.ask(ctx, s.user, http.MethodGet, "/_matrix/client/"+path+url.PathEscape(s.roomID), nil)
		if err == nil && res.Get("room_id").Str == s.roomID {
			return strings.TrimSuffix(path, "/"), nil
		}
	}
	return "", err
}

func tryToDevice(ctx context.Context, s *session) (string, error) {
	const messageType = "org.example.check"
	_, err := s.ask(ctx, s.user, http.MethodPut, fmt.Sprintf("/_matrix/client/v3/sendToDevice/%s/%d", messageType, time.Now().UnixNano()),
		homeserver.JSON{"messages": homeserver.JSON{s.user.UserID: homeserver.JSON{s.deviceID: homeserver.JSON{}}}})
	if err != nil {
		return "", err
	}
	return "", s.await(ctx, func(res homeserver.Response) bool {
		return contains(res.Get("to_device.events"), "type", messageType)
	})
}

func tryExpiring(ctx context.Context, s *session) (string, error) {
	res, err := s.ask(ctx, s.user, http.MethodPut, homeserver.StatePath(s.roomID, "m.call.member", s.user.UserID),
		homeserver.JSON{"m.will_expire": 60})
	if err != nil {
		return "", err
	}
	token := res.Get("expire_refresh_token").Str
	if token == "" {
		return "", errors.New("the answer has no token")
	}
	for _, method := range []string{"refresh", "end"} {
		if _, err = s.ask(ctx, s.anybody(), http.MethodPut, "/_matrix/client/v3/expiration/"+method,
			homeserver.JSON{"expire_refresh_token": token}); err != nil {
			return "", err
		}
	}
	return "", s.await(ctx, func(res homeserver.Response) bool {
		return contains(s.inRoom(res, "timeline.events"), `content.m\.will_expire`, "ended")
	})
}
