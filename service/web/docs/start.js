// Paths are relative, so that the page works behind a proxy's prefix. Without validatorUrl it would call swagger.io.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
});
