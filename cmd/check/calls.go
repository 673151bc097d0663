package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// homeRTC is where a homeserver itself gives out tokens and takes leave events (MSC4195). Clients of today know only the unstable path.
	homeRTC       = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit"
	homeRTCStable = "/_matrix/client/v1/rtc/livekit"
	// delegatePath is where leave events are handed over, below homeRTC and below the service.
	delegatePath = "/delegate_delayed_leave"
)

func tryFoci(_ context.Context, s *session) (string, error) {
	transport, err := liveKit(s.wellKnown.Get(`org\.matrix\.msc4143\.rtc_foci`))
	return transport.Get("livekit_service_url").Str, err
}

// liveKit returns the first LiveKit transport in a list.
func liveKit(transports gjson.Result) (transport gjson.Result, err error) {
	for _, transport := range transports.Array() {
		if transport.Get("type").Str == "livekit" && transport.Get("livekit_service_url").Str != "" {
			return transport, nil
		}
	}
	return gjson.Result{}, errors.New("no LiveKit named")
}

func tryTransports(ctx context.Context, s *session) (string, error) {
	res, err := s.ask(ctx, s.user, http.MethodGet, "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports", nil)
	if err != nil {
		return "", err
	}
	s.transport, err = liveKit(res.Get("rtc_transports"))
	return s.transport.Get("livekit_service_url").Str, err
}

func tryAnyTransport(_ context.Context, s *session) (_ string, err error) {
	if !s.transport.Exists() {
		s.transport, err = liveKit(s.wellKnown.Get(`org\.matrix\.msc4143\.rtc_foci`))
	}
	return s.transport.Get("livekit_service_url").Str, err
}

func tryOpenID(ctx context.Context, s *session) (string, error) {
	res, err := s.ask(ctx, s.user, http.MethodPost,
		"/_matrix/client/v3/user/"+url.PathEscape(s.user.UserID)+"/openid/request_token", homeserver.JSON{})
	if err == nil && res.Get("access_token").Str == "" {
		err = errors.New("the answer has no token")
	}
	if err != nil {
		return "", err
	}
	s.openID = res.Get("@this")
	return "", nil
}

// service is a client of the service that gives out tokens for LiveKit.
func (s *session) service() *homeserver.Client {
	return &homeserver.Client{URL: strings.TrimRight(s.transport.Get("livekit_service_url").Str, "/"), HTTP: s.http}
}

// sfuGet asks the service for a token as Element Call does, with more fields. The answer has the URL of LiveKit, and the token.
func (s *session) sfuGet(ctx context.Context, more homeserver.JSON) (gjson.Result, error) {
	body := homeserver.JSON{"room": s.roomID, "openid_token": s.openID.Value(), "device_id": s.deviceID}
	maps.Copy(body, more)
	res, err := s.ask(ctx, s.service(), http.MethodPost, "/sfu/get", body)
	if err == nil && res.Get("jwt").Str == "" {
		err = errors.New("the answer has no token")
	}
	return res.Get("@this"), err
}

func trySFU(ctx context.Context, s *session) (string, error) {
	if !s.openID.Exists() {
		return "", unknownError("no OpenID token")
	}
	answer, err := s.sfuGet(ctx, nil)
	if err != nil {
		return "", err
	}
	s.sfu = answer
	return answer.Get("url").Str, nil
}

// tryHealth asks the health check of the homeserver, which looks at LiveKit every minute. A proxy should not let clients reach it.
func tryHealth(ctx context.Context, s *session) (string, error) {
	res, err := (&homeserver.Client{URL: s.server, HTTP: s.http}).Do(ctx, http.MethodGet, "/_dendrite/monitor/health", nil)
	if err != nil || res.Code != http.StatusOK && res.Code != http.StatusServiceUnavailable {
		return "not shown at " + s.server, nil
	}
	var degraded []string
	for _, name := range res.Get("degraded").Array() {
		degraded = append(degraded, name.Str)
	}
	if len(degraded) > 0 {
		return "", errors.New(strings.Join(degraded, "; "))
	}
	return "", nil
}

// tryURLs looks for URLs that a browser does not call from a page of a secure site.
func tryURLs(_ context.Context, s *session) (string, error) {
	var insecure []string
	for _, text := range []string{s.transport.Get("livekit_service_url").Str, s.transport.Get("url").Str, s.sfu.Get("url").Str} {
		if text != "" && !isSecure(text) && !slices.Contains(insecure, text) {
			insecure = append(insecure, text)
		}
	}
	if len(insecure) > 0 {
		return "", errors.New("a page with https:// cannot call " + strings.Join(insecure, ", "))
	}
	return "", nil
}

// isSecure reports whether a URL has TLS, or leads to the browser's own machine.
func isSecure(text string) bool {
	u, err := url.Parse(text)
	if err != nil || u.Scheme == "https" || u.Scheme == "wss" || u.Hostname() == "localhost" {
		return err == nil
	}
	address, err := netip.ParseAddr(u.Hostname())
	return err == nil && address.IsLoopback()
}

// tryLiveKit asks LiveKit whether it would let the owner of the token in, and whether a WebSocket would reach it. Nobody joins.
func tryLiveKit(ctx context.Context, s *session) (string, error) {
	base := strings.TrimRight(s.sfu.Get("url").Str, "/")
	if rest, ok := strings.CutPrefix(base, "ws"); ok {
		base = "http" + rest // and https for wss
	}
	// A browser opens a WebSocket with HTTP/1.1, and follows no redirect.
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetHTTP1(true)
	defer transport.CloseIdleConnections()
	client := &homeserver.Client{URL: base, HTTP: &http.Client{
		Timeout: requestTime, Transport: transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	res, err := client.Do(ctx, http.MethodGet, "/rtc/validate?access_token="+url.QueryEscape(s.sfu.Get("jwt").Str), nil, "Origin", origin)
	if err != nil {
		return "", fmt.Errorf("LiveKit cannot be reached: %w", plain(err))
	}
	if trouble := refusal(res); trouble != "" {
		return "", fmt.Errorf("HTTP %d: %s", res.Code, trouble)
	}
	// Without a token LiveKit answers 401 to a WebSocket, and 404 to everything else.
	res, err = client.Do(ctx, http.MethodGet, "/rtc", nil, "Origin", origin, "Connection", "Upgrade", "Upgrade", "websocket",
		"Sec-WebSocket-Version", "13", "Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
	switch {
	case err != nil:
		return "", fmt.Errorf("a WebSocket does not get through to LiveKit: %w", plain(err))
	case res.Code != http.StatusUnauthorized:
		return "", fmt.Errorf("a WebSocket does not get through to LiveKit: HTTP %d", res.Code)
	}
	return base, nil
}

// refusal says why a token was not accepted, or "". It repeats nothing of the answer's body, because LiveKit puts the token there.
func refusal(res homeserver.Response) string {
	body := strings.TrimSpace(string(res.Body))
	switch code := res.Code; {
	case code == http.StatusOK && body == "success":
		return ""
	case code == http.StatusUnauthorized:
		return "LiveKit refuses the token, because of its key, its secret or the time in it"
	case code == http.StatusNotFound && strings.Contains(body, "room does not exist"):
		return "LiveKit takes the token, and has no room for it: the service makes rooms at another LiveKit, or makes none"
	case code == http.StatusNotFound:
		return "there is no LiveKit at this path"
	case code == http.StatusBadGateway, code == http.StatusServiceUnavailable, code == http.StatusGatewayTimeout:
		return "the proxy does not reach LiveKit"
	case code/100 == 3:
		return "a redirect, which a WebSocket does not follow"
	case code == http.StatusOK:
		return "something else than LiveKit answers at this path"
	}
	return "LiveKit does not take the token"
}

// promises returns nil if a server seems to take leave events, for Element Call. It asks without a body and a token, and any answer but 404
// that its page may read counts.
func (s *session) promises(ctx context.Context, server *homeserver.Client, path string) error {
	res, err := server.Do(ctx, http.MethodPost, path, nil, "Origin", origin)
	switch {
	case err != nil:
		return plain(err)
	case res.Code == http.StatusNotFound:
		return errors.New("HTTP 404")
	}
	return allowed(res.Header.Get("Access-Control-Allow-Origin"), origin, "the answer's origin")
}

func tryTakes(ctx context.Context, s *session) (string, error) {
	err := s.promises(ctx, s.service(), delegatePath)
	s.takesLeaves = err == nil
	return "", err
}

// tryPromise looks for the trap: one promise is enough for Element Call, and it always hands over to the service.
func tryPromise(ctx context.Context, s *session) (string, error) {
	switch err := s.promises(ctx, s.anybody(), homeRTC+delegatePath); {
	case err != nil && s.takesLeaves:
		return "by the service", nil
	case err != nil:
		return "by nobody: clients restart their leaves themselves", nil
	case !s.takesLeaves:
		return "", errors.New("the homeserver promises it, and the service takes none")
	}
	return "by the homeserver and the service", nil
}

// tryHandOver hands over a leave of a participant who never connects.
func tryHandOver(ctx context.Context, s *session) (string, error) {
	const delay = 3 * time.Second
	switch {
	case s.leaveID == "":
		return "", unknownError("no delayed leave")
	case !s.takesLeaves:
		return "not needed: the service takes none", nil
	}
	if err := s.setMember(ctx, `{"application":"m.call","call_id":""}`); err != nil {
		return "", err
	}
	delayID, err := s.schedule(ctx, delay)
	if err != nil {
		return "", err
	}
	began := time.Now()
	if _, err = s.sfuGet(ctx, homeserver.JSON{
		"delay_id": delayID, "delay_timeout": delay.Milliseconds(), "delay_cs_api_url": s.base,
	}); err != nil {
		return "", err
	}
	if err = s.awaitMember(ctx, "{}"); err != nil {
		return "", err
	}
	return fmt.Sprintf("%v after it was handed over", time.Since(began).Round(10*time.Millisecond)), nil
}

// tryHomeToken asks the homeserver itself for a token. Newer clients do so if a transport has a url, and then ask nobody else.
func tryHomeToken(ctx context.Context, s *session) (string, error) {
	announced := s.transport.Get("url").Str
	ask := func(path string) error {
		res, err := s.ask(ctx, s.user, http.MethodPost, path+"/get_token", homeserver.JSON{
			"url": cmp.Or(announced, s.sfu.Get("url").Str), "room_id": s.roomID, "slot_id": "m.call#ROOM", "member_id": "check",
		})
		if err == nil && res.Get("jwt").Str == "" {
			err = errors.New("the answer has no token")
		}
		return err
	}
	switch err := ask(homeRTC); {
	case err != nil && announced == "":
		return "not needed: the transports have no url", nil
	case err != nil:
		return "", err
	case ask(homeRTCStable) != nil:
		return "only on the unstable path", nil
	}
	return "", nil
}
