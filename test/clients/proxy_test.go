//go:build all

package clients

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// proxy is a reverse proxy between a participant and the server.
type proxy struct {
	url string
	// mu is read-locked while a request about a delayed event is forwarded, and guards aliases.
	mu sync.RWMutex
	// aliases has, for a delay ID that the participant knows, the one by which the server knows the event.
	aliases map[string]string
}

// newProxy starts a proxy. It calls before with each request, and forwards the request when before returns.
func newProxy(t *testing.T, target string, before func(*http.Request)) *proxy {
	t.Helper()
	to, err := url.Parse(target)
	require.NoError(t, err)
	p := &proxy{aliases: map[string]string{}}
	reverse := &httputil.ReverseProxy{
		Rewrite:      func(r *httputil.ProxyRequest) { r.SetURL(to) },
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		before(req)
		if rest, ok := strings.CutPrefix(req.URL.Path, unstableEvents+"/"); ok {
			p.mu.RLock()
			defer p.mu.RUnlock()
			delayID, action, _ := strings.Cut(rest, "/")
			if alias := p.aliases[delayID]; alias != "" {
				req.URL.Path, req.URL.RawPath = unstableEvents+"/"+alias+"/"+action, ""
			}
		}
		reverse.ServeHTTP(w, req)
	}))
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	p.url = server.URL
	return p
}

// rename makes the server's new delay ID of an event that of the participant's requests about it. p.mu must be held.
func (p *proxy) rename(delayID, again string) {
	for known, alias := range p.aliases {
		if alias == delayID {
			p.aliases[known] = again
		}
	}
	p.aliases[delayID] = again
}
