package main

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strings"

	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

func tryFoci(_ context.Context, s *session) (string, error) {
	return liveKit(s.wellKnown.Get(`org\.matrix\.msc4143\.rtc_foci`))
}

// liveKit returns the token URL of the first LiveKit transport in a list.
func liveKit(transports gjson.Result) (string, error) {
	for _, transport := range transports.Array() {
		if serviceURL := transport.Get("livekit_service_url").Str; transport.Get("type").Str == "livekit" && serviceURL != "" {
			return serviceURL, nil
		}
	}
	return "", errors.New("no LiveKit named")
}

func tryTransports(ctx context.Context, s *session) (string, error) {
	res, err := s.ask(ctx, s.user, http.MethodGet, "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports", nil)
	if err != nil {
		return "", err
	}
	s.sfuURL, err = liveKit(res.Get("rtc_transports"))
	return s.sfuURL, err
}

func tryAnyTransport(ctx context.Context, s *session) (string, error) {
	if s.sfuURL == "" {
		var err error
		if s.sfuURL, err = tryFoci(ctx, s); err != nil {
			return "", err
		}
	}
	return s.sfuURL, nil
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

func trySFU(ctx context.Context, s *session) (string, error) {
	switch {
	case s.sfuURL == "":
		return "", unknownError("no transport")
	case !s.openID.Exists():
		return "", unknownError("no OpenID token")
	}
	service := &homeserver.Client{URL: strings.TrimSuffix(s.sfuURL, "/"), HTTP: s.http}
	res, err := s.ask(ctx, service, http.MethodPost, "/sfu/get",
		homeserver.JSON{"room": s.roomID, "openid_token": s.openID.Value(), "device_id": s.deviceID})
	if err == nil && res.Get("jwt").Str == "" {
		err = errors.New("the answer has no token")
	}
	return res.Get("url").Str, err
}
