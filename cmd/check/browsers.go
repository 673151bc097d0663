package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// tryBrowsers checks whether a page on another domain may send every request made so far, and read the answers.
func tryBrowsers(ctx context.Context, s *session) (string, error) {
	var refused []string
	looked := map[exchange]bool{}
	for _, asked := range s.asked {
		if looked[asked] {
			continue
		}
		looked[asked] = true
		err := allowed(asked.allowOrigin, origin, "the answer's origin")
		if err == nil && asked.ok {
			err = s.preflight(ctx, asked)
		}
		if err != nil {
			refused = append(refused, fmt.Sprintf("%s %s: %v", asked.method, asked.path, err))
		}
	}
	switch {
	case len(looked) == 0:
		return "", unknownError("nothing was answered")
	case len(refused) > 0:
		return "", fmt.Errorf("%d of %d requests: %s", len(refused), len(looked), refused[0])
	}
	return fmt.Sprintf("%d requests", len(looked)), nil
}

// preflight sends the preflight request that a browser sends before a request with a token, a body, or a method other than GET.
func (s *session) preflight(ctx context.Context, asked exchange) error {
	var headers []string
	if asked.authed {
		headers = append(headers, "authorization")
	}
	if asked.body {
		headers = append(headers, "content-type")
	}
	if asked.method == http.MethodGet && len(headers) == 0 {
		return nil
	}
	client := &homeserver.Client{URL: asked.base, HTTP: s.http}
	res, err := client.Do(ctx, http.MethodOptions, asked.path, nil, "Origin", origin,
		"Access-Control-Request-Method", asked.method, "Access-Control-Request-Headers", strings.Join(headers, ","))
	if err != nil {
		return plain(err)
	}
	if res.Code/100 != 2 {
		return errors.New("OPTIONS: " + said(res))
	}
	errs := []error{
		allowed(res.Header.Get("Access-Control-Allow-Origin"), origin, "the origin"),
		allowed(res.Header.Get("Access-Control-Allow-Methods"), asked.method, "the method"),
	}
	for _, header := range headers {
		errs = append(errs, allowed(res.Header.Get("Access-Control-Allow-Headers"), header, "the header "+header))
	}
	return errors.Join(errs...)
}

// allowed returns an error unless the list contains wanted. A star does not allow the header Authorization.
func allowed(list, wanted, what string) error {
	for entry := range strings.SplitSeq(list, ",") {
		entry = strings.TrimSpace(entry)
		if strings.EqualFold(entry, wanted) || entry == "*" && wanted != "authorization" {
			return nil
		}
	}
	return fmt.Errorf("%s is not allowed", what)
}
