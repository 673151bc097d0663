// Package around is for middlewares that change an answer of Dendrite's.
package around

import (
	"bytes"
	"encoding/json"
	"net/http"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/util"
)

// Get returns a middleware for the router of a route of Dendrite's. It hands the GET requests that match over to the handler that handle
// makes of Dendrite's own. All other requests pass through.
func Get(matches func(*http.Request) bool, handle func(dendrite http.Handler) http.Handler) mux.MiddlewareFunc {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Method == http.MethodGet && matches(req) {
				handle(next).ServeHTTP(w, req) // gorilla/mux applies middlewares anew to each request
				return
			}
			next.ServeHTTP(w, req)
		})
	}
}

// Answer returns Dendrite's answer. ok is false if it is not a success; then the caller answers the same.
func Answer(dendrite http.Handler, req *http.Request) (answer util.JSONResponse, body []byte, ok bool) {
	kept := buffer{header: http.Header{}, code: http.StatusOK}
	dendrite.ServeHTTP(&kept, req)
	body = kept.body.Bytes()
	return util.JSONResponse{Code: kept.code, JSON: json.RawMessage(body)}, body, kept.code == http.StatusOK
}

// Object returns a middleware that changes the JSON object with which Dendrite answers a GET request for a path. metric names the handler.
func Object(path, metric string, change func(map[string]json.RawMessage) error) mux.MiddlewareFunc {
	matches := func(req *http.Request) bool { return req.URL.Path == path }
	return Get(matches, func(dendrite http.Handler) http.Handler {
		return httputil.MakeExternalAPI(metric, func(req *http.Request) util.JSONResponse {
			answer, body, ok := Answer(dendrite, req)
			if !ok {
				return answer
			}
			var object map[string]json.RawMessage
			err := json.Unmarshal(body, &object)
			if err == nil {
				err = change(object)
			}
			if err != nil {
				return util.ErrorResponse(err)
			}
			return util.JSONResponse{Code: http.StatusOK, JSON: object}
		})
	})
}

// buffer is a ResponseWriter that keeps the answer in memory.
type buffer struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (b *buffer) Header() http.Header         { return b.header }
func (b *buffer) WriteHeader(code int)        { b.code = code }
func (b *buffer) Write(p []byte) (int, error) { return b.body.Write(p) }
